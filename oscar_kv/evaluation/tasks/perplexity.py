"""Perplexity over a quantized prefix, and how far the logits are from those of a full one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from oscar_kv.evaluation.cache import FULL_BITS, Bits, Contender, bits_of
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.tasks.base import Measured, Progress, Windowed, exact_prompt
from oscar_kv.evaluation.teacher import fill, forced, kl_divergence


@dataclass(frozen=True, kw_only=True)
class Perplexity(Windowed):
    """Teacher-forced: a prompt of ``prefix`` tokens, the rest of the window in steps.

    Attributes:
        prefix: of them, the prompt.
        step: tokens per forward pass; where ``prefix`` and ``step`` are multiples of 128 a step is
            what decoding token by token would be (:class:`~oscar_kv.evaluation.cache.MethodLayer`).
        batch: windows at a time.
    """

    windows: int = 8
    prefix: int = 1024
    step: int = 128
    batch: int = 1
    name: ClassVar[str] = "perplexity"

    def run(
        self, subject: Subject, contenders: Sequence[Contender], seed: int, progress: Progress
    ) -> list[Measured]:
        """Loss, KL divergence and top-1 agreement of every contender.

        ``increase_error`` is the standard error of ``increase_percent`` over windows, paired with
        the full cache.
        """
        windows = subject.windows(self.windows, self.length)
        full_losses: list[Tensor] = []
        tallies = [_Tally() for _ in contenders]
        for tokens in windows.split(self.batch):
            prompt = exact_prompt(subject, tokens[:, : self.prefix])
            full = fill(DynamicCache(config=subject.model.config), prompt)
            exact = list(self._steps(subject, tokens, full))
            full_losses.append(torch.cat([_losses(*step) for step in exact], 1).sum(-1))
            for one, tally in zip(contenders, tallies):
                cache = fill(one.make_cache(), prompt)
                found = torch.zeros(3, len(tokens), dtype=torch.float64)
                steps = self._steps(subject, tokens, cache)
                for (reference, _), (logits, targets) in zip(exact, steps):
                    same = logits.argmax(-1) == reference.argmax(-1)
                    parts = _losses(logits, targets), kl_divergence(reference, logits), same
                    found += torch.stack([part.double().sum(-1).cpu() for part in parts])
                tally.sums.append(found)
                tally.bits = bits_of(cache)
                progress(len(tokens))
        scored = self.length - 1 - self.prefix
        full_loss = torch.cat(full_losses).double().cpu() / scored
        return [
            Measured(tally.bits, _summary(torch.cat(tally.sums, 1) / scored, full_loss, scored))
            for tally in tallies
        ]

    def _steps(
        self, subject: Subject, tokens: Tensor, cache: Cache
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return forced(subject.model, tokens, cache, self.prefix, self.step)


@dataclass
class _Tally:
    """Sums of loss, divergence and agreement ``[3, B]`` of every batch, and the latest bits."""

    sums: list[Tensor] = field(default_factory=list)
    bits: Bits = FULL_BITS


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods ``[B, n]``, nats."""
    return F.cross_entropy(logits.float().mT, targets, reduction="none")


def _summary(found: Tensor, full: Tensor, scored: int) -> dict[str, object]:
    loss, kl, agreement = found
    difference = loss - full
    ratio = math.exp(float(difference.mean()))
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else None
    return {
        "tokens": scored * len(loss),
        "loss": float(loss.mean()),
        "perplexity": math.exp(float(loss.mean())),
        "full_perplexity": math.exp(float(full.mean())),
        "increase_percent": 100 * (ratio - 1),
        "increase_error": None if error is None else 100 * ratio * error,
        "kl": float(kl.mean()),
        "agreement": float(agreement.mean()),
        "loss_by_window": [round(value, 6) for value in loss.tolist()],
    }
