"""Which cached positions a query may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """The visible positions of the newest ``num_queries`` tokens of each sequence.

    Query ``i`` of a sequence sits at position ``length - num_queries + i``. Fields as in
    :func:`oscar_kv.core.attention.attention`.
    """

    num_queries: int
    starts: Tensor | None = None
    sliding_window: int | None = None
    mask: Tensor | None = None

    def apply(
        self,
        logits: Tensor,
        begins: Sequence[int],
        ends: Sequence[int],
        lengths: Sequence[int],
    ) -> Tensor:
        """Hides what must not be seen in one block of columns.

        Args:
            logits: ``[B, H, M, N]``, ``M = G * num_queries`` rows, query fastest.
            begins: position of the first column, per sequence.
            ends: positions from here on are hidden, per sequence.
            lengths: tokens of each sequence.

        Returns:
            The logits, hidden ones ``-inf``; the same tensor where nothing is hidden.
        """
        columns = logits.shape[-1]
        restricted = self.mask is not None or self.starts is not None or self.sliding_window
        if not restricted and all(
            begin + columns <= min(end, length - self.num_queries + 1)
            for begin, end, length in zip(begins, ends, lengths)
        ):
            return logits
        device = logits.device

        def per_sequence(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, device=device).view(-1, 1, 1, 1, 1)

        position = per_sequence(begins) + torch.arange(columns, device=device)
        own = per_sequence(lengths) - self.num_queries
        own = own + torch.arange(self.num_queries, device=device).view(-1, 1)
        visible = position < per_sequence(ends)
        grouped = logits.unflatten(2, (-1, self.num_queries))  # [B, H, G, Tq, N]
        if self.mask is None:
            visible = visible & (position <= own)
            if self.starts is not None:
                visible = visible & (position >= self.starts.view(-1, 1, 1, 1, 1))
        else:
            mask = self._columns_of_mask(position, grouped)
            if mask.dtype == torch.bool:
                visible = visible & mask
            else:
                grouped = grouped + mask
        if self.sliding_window is not None:
            visible = visible & (position > own - self.sliding_window)
        return grouped.masked_fill(~visible, -torch.inf).flatten(2, 3)

    def _columns_of_mask(self, position: Tensor, grouped: Tensor) -> Tensor:
        """The mask ``[B|1, Hq|1, Tq|1, T]`` at these positions: ``[B, H|1, G|1, Tq, N]``."""
        assert self.mask is not None
        batch, heads = grouped.shape[:2]
        mask = self.mask.expand(batch, -1, self.num_queries, -1)
        mask = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (heads, -1))
        index = position.clamp_max(mask.shape[-1] - 1)
        return mask.gather(-1, index.expand(*mask.shape[:-1], -1))
