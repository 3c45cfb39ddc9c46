"""Attention-output error: what a cache does to every layer by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from oscar_kv.core.attention import attention
from oscar_kv.evaluation.cache import FULL_BITS, Contender, bits_of
from oscar_kv.evaluation.capture import capture
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

    def run(
        self, subject: Subject, contenders: Sequence[Contender], seed: int, progress: Progress
    ) -> list[Measured]:
        """``error``, the mean over layers and windows, and ``error_by_layer``."""
        errors: list[list[list[float]]] = [[] for _ in contenders]
        bits = [FULL_BITS for _ in contenders]
        for tokens in subject.windows(self.windows, self.length).split(1):
            states = capture(subject.model, tokens)
            queries = [layer.queries[:, :, -self.queries :] for layer in states.values()]
            exact = [attention(q, *layer[1:]) for q, layer in zip(queries, states.values())]
            for index, one in enumerate(contenders):
                cache = one.make_cache()
                for number, layer in states.items():
                    older = layer.keys[:, :, : -self.queries], layer.values[:, :, : -self.queries]
                    cache.update(*older, layer_idx=number)
                found = []
                for (number, layer), query, out in zip(states.items(), queries, exact):
                    keys, values = (part[:, :, -self.queries :] for part in layer[1:])
                    seen = (part[...] for part in cache.update(keys, values, number))
                    error = attention(query, *seen) - out
                    norms = (torch.linalg.vector_norm(part.float()) for part in (error, out))
                    found.append(float(next(norms) / next(norms)))
                errors[index].append(found)
                bits[index] = bits_of(cache)
                progress(1)
        return [Measured(count, _summary(found)) for count, found in zip(bits, errors)]


def _summary(errors: list[list[float]]) -> dict[str, object]:
    by_layer = torch.tensor(errors).mean(0)
    return {"error": float(by_layer.mean()), "error_by_layer": by_layer.tolist()}
