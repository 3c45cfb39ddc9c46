"""Host-side bookkeeping of a batch: how long each sequence is and which pages it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS, OscarConfig


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

    def pages_after(self, tokens: int, config: OscarConfig) -> int:
        """How many pages there will be once ``tokens`` more have come."""
        tail = self.tail + tokens - min(tokens, config.sink_tokens - self.sinks)
        return len(self.pages) + max(0, tail - config.recent_tokens) // PAGE_TOKENS

    def pages_missing(self, tokens: int, config: OscarConfig) -> int:
        """How many of these are neither there nor reserved."""
        return max(0, self.pages_after(tokens, config) - len(self.pages + self.reserved))

    def advance(self, tokens: int, config: OscarConfig) -> tuple[int, ...]:
        """Counts ``tokens`` more, and returns the reserved pages that they completed."""
        new_pages = self.pages_after(tokens, config) - len(self.pages)
        sinks = min(tokens, config.sink_tokens - self.sinks)
        self.sinks += sinks
        self.tail += tokens - sinks - PAGE_TOKENS * new_pages
        completed, self.reserved = self.reserved[:new_pages], self.reserved[new_pages:]
        self.pages += completed
        return completed


def advanced(
    sequences: Sequence[SequenceState], counts: Sequence[int], config: OscarConfig
) -> tuple[list[SequenceState], list[int]]:
    """Copies of sequences with so many tokens more, and the reserved pages that they completed."""
    after = [replace(sequence) for sequence in sequences]
    each = zip(after, counts)
    return after, [page for one, count in each for page in one.advance(count, config)]


@dataclass(frozen=True)
class Group:
    """Sequences of equal shape, which one tensor operation can handle together."""

    rows: slice | Tensor
    """Index of the batch dimension: everything, or these rows."""
    numbers: list[int]
    """The rows, in any case as numbers."""
    sample: SequenceState
    """One of the sequences: they all have its shape."""
    new_tokens: int


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
            rows,
            sequences[rows[0]],
            shape[-1],
        )
        for shape, rows in members.items()
    ]
