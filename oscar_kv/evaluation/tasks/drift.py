"""Drift: whether what a cache does to the logits grows along a long continuation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oscar_kv.evaluation.cache import FULL_BITS, Contender, bits_of
from oscar_kv.evaluation.names import require_at_least
from oscar_kv.evaluation.reference import Reference
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.tasks.base import Forced, Measured, Progress
from oscar_kv.evaluation.teacher import fill, forced, kl_divergence


@dataclass(frozen=True, kw_only=True)
class Drift(Forced):
    """KL divergence from the full cache's logits, by position in a teacher-forced continuation.

    The states that a contender stores come from its own, perturbed forward passes, as in
    generation; the tokens are those of the text, so that all contenders stay on the same path.

    Attributes:
        bucket: positions that are averaged.
    """

    windows: int = 2
    prefix: int = 256
    bucket: int = 256
    name: ClassVar[str] = "drift"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, bucket=self.bucket)

    def run(
        self, subject: Subject, contenders: Iterable[Contender], seed: int, progress: Progress
    ) -> Iterator[Measured]:
        """``kl_by_position``: the mean of every bucket; and ``kl``, the mean of all."""
        reference, model = Reference(subject.model), subject.model
        windows = subject.windows(self.windows, self.length).split(1)
        for one in contenders:
            total, bits = torch.zeros(self.scored), FULL_BITS
            for tokens in windows:
                cache = fill(one.make_cache(), reference.prompt(tokens[:, : self.prefix]))
                exact = reference.logits(tokens, self.prefix, self.step)
                found = zip(exact, forced(model, tokens, cache, self.prefix, self.step))
                divergence = [kl_divergence(logits, step)[0] for logits, (step, _) in found]
                total += torch.cat(divergence).cpu() / self.windows
                bits = bits_of(cache)
                progress(1)
            yield Measured(bits, self._summary(total))

    def _summary(self, by_position: Tensor) -> dict[str, object]:
        buckets = [float(part.mean()) for part in by_position.split(self.bucket)]
        return {"kl": float(by_position.mean()), "kl_by_position": buckets}
