"""QuaRot's KV cache: rotate, then quantize per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from oscar_kv.core.rotation import rotate, rotate_back
from oscar_kv.evaluation.methods.base import Coded, Method, Quantized, minmax_coded, quantized


@dataclass(frozen=True, kw_only=True)
class QuaRot(Method):
    """A Hadamard rotation of every head, then an asymmetric grid per token and head.

    Attributes:
        bits: of a code.
        clip: factor of minimum and maximum; 0.95 in the paper.
    """

    bits: int = 2
    clip: float = 0.95
    source: ClassVar[str] = "QuaRot, arXiv 2404.00456, section 4, stage 2c"

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        return quantized(self._coded(keys), self._coded(values))

    def _coded(self, x: Tensor) -> Coded:
        read, bits = minmax_coded(rotate(x), -1, x.shape[-1], self.bits, self.clip)
        return Coded(rotate_back(read), bits)
