"""The full-precision side of a comparison: what every contender needs of the same windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from oscar_kv.evaluation.capture import capture
from oscar_kv.evaluation.methods import LayerStates
from oscar_kv.evaluation.teacher import fill, forced, read_prompt
from oscar_kv.generation import cache_nbytes

KEPT_BYTES = 1 << 30
"""Prompts, logits and states that are kept from one contender to the next. The logits of one window
of a large vocabulary take more: they are computed again, chunk by chunk beside the contender's."""


class Reference:
    """What a model makes of windows without quantization, computed once as long as it fits.

    Args:
        model: in evaluation mode.
        limit: bytes to keep.
    """

    def __init__(self, model: Any, limit: int = KEPT_BYTES) -> None:
        self._model = model
        self._left = limit
        self._kept: dict[tuple[Any, ...], Any] = {}

    def prompt(self, tokens: Tensor) -> DynamicCache:
        """A cache that has read ``tokens``, int ``[B, T]``, for :func:`teacher.fill`."""
        key = ("prompt", _bytes(tokens))
        if key in self._kept:
            return self._kept[key]
        cache = DynamicCache(config=self._model.config)
        read_prompt(self._model, tokens, cache)
        self._keep(key, cache, cache_nbytes(cache))
        return cache

    def logits(self, tokens: Tensor, prefix: int, step: int) -> Iterator[Tensor]:
        """``[B, n, V]`` of every step behind a prompt of ``prefix`` tokens, as
        :func:`teacher.forced` feeds the rest."""
        key = ("logits", _bytes(tokens), prefix, step)
        if key in self._kept:
            yield from self._kept[key]
            return
        cache = fill(DynamicCache(config=self._model.config), self.prompt(tokens[:, :prefix]))
        scored = tokens.shape[1] - 1 - prefix
        kept, size = [], 0
        for logits, _ in forced(self._model, tokens, cache, prefix, step):
            size = logits[:, :1].nbytes * scored
            if size <= self._left:
                kept.append(logits)
            yield logits
        if kept:
            self._keep(key, kept, size)

    def states(self, tokens: Tensor) -> dict[int, LayerStates]:
        """Of every full-attention layer over ``tokens``, by its index."""
        key = ("states", _bytes(tokens))
        if key in self._kept:
            return self._kept[key]
        found = capture(self._model, tokens)
        self._keep(key, found, sum(x.nbytes for layer in found.values() for x in layer))
        return found

    def _keep(self, key: tuple[Any, ...], value: Any, size: int) -> None:
        if size <= self._left:
            self._kept[key] = value
            self._left -= size


def _bytes(tokens: Tensor) -> bytes:
    return tokens.cpu().numpy().tobytes()
