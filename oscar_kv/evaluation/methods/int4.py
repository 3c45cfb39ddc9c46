"""INT4 with one asymmetric grid per token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from oscar_kv.evaluation.methods.base import Method, Quantized, minmax_coded, quantized


@dataclass(frozen=True, kw_only=True)
class Int4(Method):
    """4-bit codes between the minimum and the maximum of a token's head."""

    source: ClassVar[str] = "vLLM, kv_cache_dtype int4_per_token_head"

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        key_dim, value_dim = keys.shape[-1], values.shape[-1]
        return quantized(minmax_coded(keys, -1, key_dim, 4), minmax_coded(values, -1, value_dim, 4))
