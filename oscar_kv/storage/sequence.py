"""Host-side bookkeeping of a batch: how long each sequence is and which pages it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS


@dataclass
class SequenceState:
    """One sequence: full-precision sinks, whole pages, full-precision tail."""

    sinks: int = 0
    pages: tuple[int, ...] = ()
    """Ids in the pool, oldest first."""
    tail: int = 0
    reserved: tuple[int, ...] = ()
    """Ids in the pool of the pages to come, where the sequence may grow without the host."""

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.sinks + PAGE_TOKENS * len(self.pages) + self.tail


@dataclass(frozen=True)
class Group:
    """Sequences of equal shape, which one tensor operation can handle together."""

    rows: slice | Tensor
    """Index of the batch dimension: everything, or these rows."""
    sequences: list[SequenceState]
    new_tokens: int

    @property
    def sample(self) -> SequenceState:
        """Any of the sequences: they all have its shape."""
        return self.sequences[0]


def group_by_shape(
    sequences: Sequence[SequenceState],
    device: torch.device,
    new_tokens: Sequence[int] | None = None,
) -> list[Group]:
    """Splits a batch into groups with equally many sinks, pages, tail and new tokens."""
    members: dict[tuple[int, int, int, int], list[int]] = {}
    for row, s in enumerate(sequences):
        shape = (s.sinks, len(s.pages), s.tail, 0 if new_tokens is None else new_tokens[row])
        members.setdefault(shape, []).append(row)
    everything = len(members) == 1
    return [
        Group(
            slice(None) if everything else torch.tensor(rows, device=device),
            [sequences[row] for row in rows],
            shape[-1],
        )
        for shape, rows in members.items()
    ]
