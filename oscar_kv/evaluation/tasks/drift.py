"""Drift: whether what a cache does to the logits grows along a long continuation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from oscar_kv.evaluation.cache import FULL_BITS, Contender, bits_of
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.tasks.base import Measured, Progress, Windowed, exact_prompt
from oscar_kv.evaluation.teacher import fill, forced, kl_divergence


@dataclass(frozen=True, kw_only=True)
class Drift(Windowed):
    """KL divergence from the full cache's logits, by position in a teacher-forced continuation.

    The states that a contender stores come from its own, perturbed forward passes, as in
    generation; the tokens are those of the text, so that all contenders stay on the same path.

    Attributes:
        prefix: of them, the prompt.
        bucket: positions that are averaged, a multiple of ``step``.
        step: tokens per forward pass.
    """

    windows: int = 2
    prefix: int = 256
    bucket: int = 256
    step: int = 128
    name: ClassVar[str] = "drift"

    def run(
        self, subject: Subject, contenders: Sequence[Contender], seed: int, progress: Progress
    ) -> list[Measured]:
        """``kl_by_position``: the mean of every bucket; and ``kl``, the mean of all."""
        totals = [torch.zeros(self.length - 1 - self.prefix) for _ in contenders]
        bits = [FULL_BITS for _ in contenders]
        for tokens in subject.windows(self.windows, self.length).split(1):
            prompt = exact_prompt(subject, tokens[:, : self.prefix])
            full = fill(DynamicCache(config=subject.model.config), prompt)
            exact = [step for step, _ in self._steps(subject, tokens, full)]
            for index, one in enumerate(contenders):
                cache = fill(one.make_cache(), prompt)
                found = zip(exact, self._steps(subject, tokens, cache))
                divergence = [kl_divergence(reference, step)[0] for reference, (step, _) in found]
                totals[index] += torch.cat(divergence).cpu() / self.windows
                bits[index] = bits_of(cache)
                progress(1)
        return [Measured(count, self._summary(total)) for count, total in zip(bits, totals)]

    def _steps(
        self, subject: Subject, tokens: Tensor, cache: Cache
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return forced(subject.model, tokens, cache, self.prefix, self.step)

    def _summary(self, by_position: Tensor) -> dict[str, object]:
        buckets = [float(part.mean()) for part in by_position.split(self.bucket)]
        return {"kl": float(by_position.mean()), "kl_by_position": buckets}
