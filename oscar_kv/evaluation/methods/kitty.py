"""Kitty-style: the loudest key channels of a page keep four bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oscar_kv.evaluation.methods.base import Coded, Method, Quantized, minmax_coded, quantized


@dataclass(frozen=True, kw_only=True)
class Kitty(Method):
    """Keys per channel over a page of tokens, a share of the channels of every page at 4 bits.

    Channels are ranked by their mean magnitude in the page. Values take one grid per token.

    Attributes:
        promoted: share of the channels that get ``high_bits``.
        bits, high_bits: of a code.
        block_tokens: tokens of a page, and of a key group.
    """

    promoted: float = 0.125
    bits: int = 2
    high_bits: int = 4
    sink_tokens: int = 32
    block_tokens: int = 128
    source: ClassVar[str] = "Kitty, arXiv 2511.18643, section on channel-wise precision boost"

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        dim = values.shape[-1]
        return quantized(self._keys(keys), minmax_coded(values, -1, dim, self.bits))

    def _keys(self, keys: Tensor) -> Coded:
        pages = keys.unflatten(2, (-1, self.block_tokens))
        dim, tokens = pages.shape[-1], pages.shape[-2]
        count = int(self.promoted * dim)
        loudest = pages.abs().mean(-2, keepdim=True).topk(count, -1).indices
        chosen = torch.zeros_like(pages[..., :1, :], dtype=torch.bool).scatter(-1, loudest, True)
        low, bits = minmax_coded(pages, -2, tokens, self.bits)
        high, _ = minmax_coded(pages, -2, tokens, self.high_bits)
        extra = loudest.numel() * tokens * (self.high_bits - self.bits)
        indices = loudest.numel() * math.ceil(math.log2(dim))
        return Coded(torch.where(chosen, high, low).flatten(2, 3), bits + extra + indices)
