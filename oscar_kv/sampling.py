"""How the next token is chosen from a model's logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

_NO_IDS: Any = None
"""Top-k and top-p ask for the tokens so far, and do not look at them."""


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of every row: logits ``[B, V]`` -> ids ``[B, 1]``."""
    return logits.argmax(-1, keepdim=True)


class Sampler:
    """Draws tokens at a temperature: logits ``[B, V]`` -> ids ``[B, 1]``.

    Args:
        temperature: logits are divided by it; 0 is greedy.
        top_k: draw from so many of the most likely tokens.
        top_p: draw from the fewest tokens whose probabilities add up to this.
        seed: of the draws; every run draws anew if omitted.

    Raises:
        ValueError: for a value out of range, or one that has no effect at temperature 0.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: expected a finite number, 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: expected a positive integer")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}: expected more than 0 and at most 1")
        if not temperature and (top_k is not None or top_p is not None):
            raise ValueError(
                "top_k and top_p have no effect at temperature 0, which takes the most likely "
                "token: set a temperature, such as 0.7"
            )
        self.temperature = temperature
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._warpers: list[LogitsProcessor] = []
        if top_k is not None:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, logits: Tensor) -> Tensor:
        if not self.temperature:
            return greedy(logits)
        if self.seed is not None and self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self.seed)
        scores = logits.float()
        # the largest is 0 whatever the temperature, so that a low one overflows only to -inf
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        for warp in self._warpers:
            scores = warp(_NO_IDS, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
