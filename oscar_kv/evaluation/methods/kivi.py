"""KIVI: keys per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from oscar_kv.evaluation.methods.base import Method, Quantized, minmax_coded, quantized


@dataclass(frozen=True, kw_only=True)
class KIVI(Method):
    """Keys in groups of consecutive tokens of one channel, values in groups of channels of a token.

    The residual of 128 tokens (section 3.2) is flushed whole, keys and values alike; the published
    code keeps a sliding window of 128 values instead, on average 64 more.

    Attributes:
        group: entries that share a grid.
        bits: of a code.
        block_tokens: the residual length.
    """

    group: int = 32
    bits: int = 2
    block_tokens: int = 128
    source: ClassVar[str] = "KIVI, arXiv 2402.02750, section 3 and algorithm 1"

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        return quantized(
            minmax_coded(keys, -2, self.group, self.bits),
            minmax_coded(values, -1, self.group, self.bits),
        )
