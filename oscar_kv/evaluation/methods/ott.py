"""OTT: KIVI that leaves tokens with small keys alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oscar_kv.evaluation.methods.base import FULL_PRECISION_BITS, Quantized
from oscar_kv.evaluation.methods.kivi import KIVI


@dataclass(frozen=True, kw_only=True)
class OTT(KIVI):
    """The tokens whose keys have the smallest L1 norm stay in full precision, per head.

    In the keys that are quantized they are replaced by the mean of the others, so that they do not
    widen a grid. The pool is filled from the first tokens that are quantized, the prompt, and
    stays; the paper's also takes up smaller tokens that come later.

    Attributes:
        outlier_tokens: size of the pool per KV head.
    """

    outlier_tokens: int = 5
    source: ClassVar[str] = "Outlier Tokens Tracing, arXiv 2505.10938, section 3"

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        if start:
            return super().quantize(keys, values, start)
        kept = keys.abs().sum(-1).topk(self.outlier_tokens, largest=False).indices
        pool = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
        pool = pool.scatter(-1, kept, True).unsqueeze(-1)
        others = keys.masked_fill(pool, 0).sum(-2, keepdim=True)
        others = others / (keys.shape[2] - self.outlier_tokens)
        rest = super().quantize(torch.where(pool, others, keys), values, start)
        index_bits = 32 * kept.numel()
        exact = kept.numel() * (keys.shape[-1] + values.shape[-1]) * FULL_PRECISION_BITS
        return Quantized(
            torch.where(pool, keys, rest.keys),
            torch.where(pool, values, rest.values),
            rest.bits + exact + index_bits,
        )
