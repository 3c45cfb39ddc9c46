"""What one call of attention over packed pages is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oscar_kv.kernels.masking import Visibility
from oscar_kv.storage.paged import Sequences


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of :func:`oscar_kv.kernels.extend_attention`, checked and with their defaults."""

    query: Tensor
    """``[B, Hq, Tq, D]``, unrotated."""
    packed: Sequences
    visibility: Visibility
    scaling: float
    new_keys: Tensor | None = None
    """``[B, H, Tq, D]``, the exact keys of the new tokens; ``packed`` holds these, too."""
    new_values: Tensor | None = None
    """``[B, H, Tq, E]``, with ``new_keys``."""
    softcap: float | None = None
    s_aux: Tensor | None = None
    """``[Hq]``, contiguous."""
    out: Tensor | None = None
    """``[B, Hq, Tq, E]`` in the dtype of the query, contiguous: where the result goes."""

    @property
    def rows(self) -> int:
        """Query rows of one KV head."""
        return self.query.shape[2] * (self.query.shape[1] // self.packed.layout.num_kv_heads)

    def new_result(self) -> Tensor:
        """``out``, or as much memory: ``[B, Hq, Tq, E]``, to be filled."""
        if self.out is not None:
            return self.out
        return self.query.new_empty((*self.query.shape[:3], self.packed.layout.value_dim))
