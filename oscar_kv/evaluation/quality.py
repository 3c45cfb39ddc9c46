"""What a cache costs a model: teacher-forced perplexity and recall through the public API."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from oscar_kv.config import FULL_PRECISION, OscarConfig
from oscar_kv.evaluation.teacher import forced, read_prompt
from oscar_kv.integrations.transformers import OscarCache


@dataclass(frozen=True)
class Score:
    """Next-token quality over a quantized prefix."""

    tokens: int
    """Scored tokens."""
    loss: float
    """Mean negative log-likelihood, nats."""
    agreement: float
    """Share of scored tokens where the most likely token is the full-precision cache's."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, float]:
        """Fields and perplexity, as plain numbers."""
        return {**asdict(self), "perplexity": self.perplexity}


def make_cache(
    model: PreTrainedModel, name: str, *, max_tokens: int | None = None, offloading: bool = False
) -> Cache:
    """An empty cache for ``model``: :data:`FULL_PRECISION`, or the preset called ``name``."""
    if name == FULL_PRECISION:
        return DynamicCache(config=model.config, offloading=offloading)
    config = OscarConfig.preset(name)
    return OscarCache(model.config, config, max_tokens=max_tokens, offloading=offloading)


def score(
    model: PreTrainedModel,
    windows: Tensor,
    cache_names: list[str],
    *,
    prefix: int,
    step: int = 128,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Teacher-forced scores of several caches over the same windows.

    Each window's first ``prefix`` tokens are a prompt; the rest is fed in steps of ``step``
    tokens, each attending over what the cache holds, and scored.

    Args:
        model: in evaluation mode, loaded with ``attn_implementation="oscar"`` to attend packed.
        windows: int ``[N, T]``, ``T >= prefix + 2``.
        cache_names: :data:`FULL_PRECISION` and preset names.
        prefix: prompt tokens of each window.
        step: tokens per forward pass after the prompt.
        batch_size: windows at a time.
        progress: called with the number of windows finished, after each batch of each cache.

    Returns:
        One :class:`Score` per cache name.

    Raises:
        ValueError: if the windows are too short.
    """
    if windows.ndim != 2 or windows.shape[1] < prefix + 2:
        raise ValueError(f"windows={tuple(windows.shape)}: expected [N, at least {prefix + 2}]")
    totals = {name: [0, 0.0, 0] for name in cache_names}
    for begin in range(0, len(windows), batch_size):
        tokens = windows[begin : begin + batch_size].to(model.device)
        reference: list[Tensor] = []
        for name in [FULL_PRECISION, *(n for n in cache_names if n != FULL_PRECISION)]:
            total = totals.setdefault(name, [0, 0.0, 0])
            cache = make_cache(model, name)
            for index, (logits, targets) in enumerate(_steps(model, tokens, cache, prefix, step)):
                best = logits.argmax(-1)
                if name == FULL_PRECISION:
                    reference.append(best)
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
                )
                total[0] += targets.numel()
                total[1] += loss.item()
                total[2] += int((best == reference[index]).sum())
            if progress is not None:
                progress(len(tokens))
    return {name: Score(n, loss / n, same / n) for name, (n, loss, same) in totals.items()}


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    windows: Tensor,
    answers: Tensor,
    cache_name: str,
    *,
    step: int = 128,
    batch_size: int = 4,
) -> float:
    """Share of answers whose every token is the model's first choice.

    Args:
        model: as in :func:`score`.
        windows: int ``[N, T]``.
        answers: int ``[N, A, K]``: positions of the K tokens of each of A answers.
        cache_name: as in :func:`make_cache`.
        step: tokens per forward pass; the prompt ends that many tokens before the first answer.
        batch_size: windows at a time.
    """
    prefix = max(1, int(answers.min()) - step)
    right = []
    for begin in range(0, len(windows), batch_size):
        tokens = windows[begin : begin + batch_size].to(model.device)
        where = answers[begin : begin + batch_size].to(model.device).flatten(1)
        cache = make_cache(model, cache_name)
        best = [logits.argmax(-1) for logits, _ in _steps(model, tokens, cache, prefix, step)]
        # the logits at position p choose token p + 1
        predicted = torch.cat(best, 1).gather(1, where - 1 - prefix)
        hits = predicted == tokens.gather(1, where)
        right.append(hits.unflatten(1, answers.shape[1:]).all(-1).float())
    return float(torch.cat(right).mean())


def _steps(
    model: PreTrainedModel, tokens: Tensor, cache: Cache, prefix: int, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits ``[B, n, V]`` and targets ``[B, n]`` of every step after the prompt."""
    read_prompt(model, tokens[:, :prefix], cache)
    return forced(model, tokens, cache, prefix, step)
