"""RotateKV without calibration: rotate groups of heads together, quantize per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from oscar_kv.core.rotation import rotate, rotate_back
from oscar_kv.evaluation.methods.base import Coded, Method, Quantized, minmax_coded, quantized


@dataclass(frozen=True, kw_only=True)
class RotateKV(Method):
    """One Hadamard rotation over the channels of several heads, then a grid per token and group.

    Its data-free part only. Left out: the calibrated channel order; and rotating before RoPE, for
    which there is no place behind an interface of keys after RoPE. Attention sinks, which the paper
    finds by massive activations, are the first tokens here.

    Attributes:
        bits: of a code.
        heads: KV heads that are rotated together, fewer if there are not so many.
        group: channels that share a grid.
    """

    bits: int = 2
    heads: int = 4
    group: int = 128
    sink_tokens: int = 4
    source: ClassVar[str] = "RotateKV, arXiv 2501.16383, section 3"

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        return quantized(self._coded(keys), self._coded(values))

    def _coded(self, x: Tensor) -> Coded:
        count = max(n for n in range(1, self.heads + 1) if x.shape[1] % n == 0)
        together = x.unflatten(1, (-1, count)).transpose(2, 3).flatten(-2)  # [B, H/n, T, n D]
        group = min(self.group, x.shape[-1])
        read, bits = minmax_coded(rotate(together), -1, group, self.bits)
        apart = rotate_back(read).unflatten(-1, (count, -1)).transpose(2, 3)
        return Coded(apart.flatten(1, 2), bits)
