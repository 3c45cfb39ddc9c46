"""FP8 E4M3, as serving engines deploy it: one scale for the layer, or one per token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from oscar_kv.core.grid import round_fp8
from oscar_kv.evaluation.methods.base import Coded, Method, Quantized, quantized

E4M3_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class FP8(Method):
    """Keys and values rounded to E4M3.

    Attributes:
        scale: ``"tensor"`` has the constant scale 1, which vLLM takes for a checkpoint without KV
            scales; ``"token"`` a float32 scale per token and head that brings its largest entry to
            448.
    """

    scale: Literal["tensor", "token"] = "tensor"
    source: ClassVar[str] = "vLLM, kv_cache_dtype fp8 and fp8_per_token_head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("tensor", "token"):
            raise ValueError(f"scale={self.scale!r}: expected 'tensor' or 'token'")

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        return quantized(self._coded(keys), self._coded(values))

    def _coded(self, x: Tensor) -> Coded:
        if self.scale == "tensor":
            return Coded(round_fp8(x), 8 * x.numel())
        scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX
        scale = scale.where(scale > 0, 1.0)
        return Coded(round_fp8(x / scale) * scale, 8 * x.numel() + 32 * scale.numel())
