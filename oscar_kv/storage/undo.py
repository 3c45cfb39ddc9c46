"""What takes back one append exactly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oscar_kv.storage.sequence import SequenceState


@dataclass(frozen=True)
class Undo:
    """A batch as it was before its latest append.

    Only an append that completes a page needs it: it overwrites the tail which the page was made
    of, and a page does not give back what went into it.
    """

    sequences: list[SequenceState]
    tail_keys: Tensor
    """``[B, H, tail, D]``: a copy."""
    tail_values: Tensor
    """``[B, H, tail, E]``: a copy."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [sequence.length for sequence in self.sequences]

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return self.tail_keys.nbytes + self.tail_values.nbytes
