"""Perplexity over a quantized prefix, and how far the logits are from those of a full one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from oscar_kv.evaluation.cache import FULL_BITS, Contender, bits_of
from oscar_kv.evaluation.names import require_at_least
from oscar_kv.evaluation.reference import Reference
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.tasks.base import Forced, Measured, Progress
from oscar_kv.evaluation.teacher import fill, forced, kl_divergence


@dataclass(frozen=True, kw_only=True)
class Perplexity(Forced):
    """Likelihood of the text behind the prompt, and the logits beside the full cache's.

    Attributes:
        batch: windows at a time.
    """

    windows: int = 8
    prefix: int = 1024
    batch: int = 1
    name: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, batch=self.batch)

    def run(
        self, subject: Subject, contenders: Iterable[Contender], seed: int, progress: Progress
    ) -> Iterator[Measured]:
        """Loss, KL divergence and top-1 agreement of every contender.

        ``increase_error`` is the standard error of ``increase_percent`` over windows, paired with
        the full cache.
        """
        reference, model = Reference(subject.model), subject.model
        windows = subject.windows(self.windows, self.length).split(self.batch)
        for one in contenders:
            sums, bits = [], FULL_BITS
            for tokens in windows:
                cache = fill(one.make_cache(), reference.prompt(tokens[:, : self.prefix]))
                exact = reference.logits(tokens, self.prefix, self.step)
                steps = forced(model, tokens, cache, self.prefix, self.step)
                found = torch.zeros(4, len(tokens), dtype=torch.float64)
                for expected, (logits, targets) in zip(exact, steps):
                    parts = (
                        _losses(logits, targets),
                        _losses(expected, targets),
                        kl_divergence(expected, logits),
                        logits.argmax(-1) == expected.argmax(-1),
                    )
                    found += torch.stack([part.double().sum(-1).cpu() for part in parts])
                sums.append(found)
                bits = bits_of(cache)
                progress(len(tokens))
            yield Measured(bits, _summary(torch.cat(sums, 1) / self.scored, self.scored))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods ``[B, n]``, nats."""
    return F.cross_entropy(logits.float().mT, targets, reduction="none")


def _summary(found: Tensor, scored: int) -> dict[str, object]:
    loss, full, kl, agreement = found
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
