"""Attention-output error: what a cache does to every layer by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from oscar_kv.core.attention import attention
from oscar_kv.evaluation.cache import FULL_BITS, Contender, bits_of
from oscar_kv.evaluation.names import require_at_least
from oscar_kv.evaluation.reference import Reference
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.tasks.base import Measured, Progress, Windowed


@dataclass(frozen=True, kw_only=True)
class AttentionError(Windowed):
    """``|out_hat - out| / |out|`` of a layer whose queries, keys and values are exact.

    The last ``queries`` positions of every window attend over everything before them, which the
    contender has cached: errors of layers do not add up here. Logits are scaled by
    ``head_dim ** -0.5``; a model with soft-capped logits, sinks or another scale is not served.

    Attributes:
        queries: positions that are compared.
    """

    windows: int = 4
    queries: int = 128
    name: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, queries=self.queries)
        if self.queries >= self.length:
            raise ValueError(
                f"queries={self.queries}: expected fewer than length={self.length} tokens"
            )

    def run(
        self, subject: Subject, contenders: Iterable[Contender], seed: int, progress: Progress
    ) -> Iterator[Measured]:
        """``error``, the mean over layers and windows, and ``error_by_layer``."""
        reference = Reference(subject.model)
        windows = subject.windows(self.windows, self.length).split(1)
        for one in contenders:
            errors, bits = [], FULL_BITS
            for tokens in windows:
                states, cache = reference.states(tokens), one.make_cache()
                for number, layer in states.items():
                    older = layer.keys[:, :, : -self.queries], layer.values[:, :, : -self.queries]
                    cache.update(*older, layer_idx=number)
                found = []
                for number, layer in states.items():
                    query = layer.queries[:, :, -self.queries :]
                    exact = attention(query, layer.keys, layer.values)
                    keys, values = (part[:, :, -self.queries :] for part in layer[1:])
                    seen = (part[...] for part in cache.update(keys, values, number))
                    error = attention(query, *seen) - exact
                    norms = (torch.linalg.vector_norm(part.float()) for part in (error, exact))
                    found.append(float(next(norms) / next(norms)))
                errors.append(found)
                bits = bits_of(cache)
                progress(1)
            yield Measured(bits, _summary(errors))


def _summary(errors: list[list[float]]) -> dict[str, object]:
    by_layer = torch.tensor(errors).mean(0)
    return {"error": float(by_layer.mean()), "error_by_layer": by_layer.tolist()}
