"""Sequences whose pages and newest tokens lie in somebody else's memory, as attention reads them.

An engine owns its page pool and decides where a sequence's tokens live; kernels need no more than
this view of it. :class:`~oscar_kv.storage.packed.PackedKV` is the same for a batch that owns both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.storage.layout import PageLayout


class Sequences(Protocol):
    """What attention reads of ``B`` sequences: sinks, then whole pages, then a tail.

    Attributes as in :class:`~oscar_kv.storage.packed.PackedKV`.
    """

    @property
    def layout(self) -> PageLayout: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def page_data(self) -> Tensor: ...
    @property
    def block_table(self) -> Tensor: ...
    @property
    def page_counts(self) -> Tensor: ...
    @property
    def tail_keys(self) -> Tensor: ...
    @property
    def tail_values(self) -> Tensor: ...
    @property
    def tail_lengths(self) -> Tensor: ...
    @property
    def sink_keys(self) -> Tensor: ...
    @property
    def sink_values(self) -> Tensor: ...
    @property
    def sink_lengths(self) -> Tensor: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def pages_per_sequence(self) -> list[int]: ...
    @property
    def tails_per_sequence(self) -> list[int]: ...
    @property
    def sinks_per_sequence(self) -> list[int]: ...
    @property
    def most_pages(self) -> int: ...
    @property
    def total_pages(self) -> int | None: ...
    @property
    def most_tail_tokens(self) -> int: ...
    @property
    def fewest_tail_tokens(self) -> int: ...
    def pages(self, table: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PagedSequences:
    """``B`` sequences without sinks over a pool of pages: :class:`Sequences` for an engine.

    Attributes:
        layout: of the pages.
        page_data: uint8 ``[capacity, H, page_bytes]``, contiguous.
        block_table: int32 ``[B, width]``.
        page_counts: int32 ``[B]``.
        tail_keys: ``[B, H, 128, D]``, the newest tokens in the model's dtype.
        tail_values: ``[B, H, 128, E]``.
        tail_lengths: int32 ``[B]``.
        sink_lengths: int32 ``[B]``, zeros.
        most_pages: no sequence has more.

    The reference backend also reads what is not in use, with a weight of zero: entries of the
    table from ``page_counts`` on have to name pages that hold finite numbers (unless there are none
    that do), and the tail's slots from ``tail_lengths`` on to be finite. Kernels read neither.
    """

    layout: PageLayout
    page_data: Tensor
    block_table: Tensor
    page_counts: Tensor
    tail_keys: Tensor
    tail_values: Tensor
    tail_lengths: Tensor
    sink_lengths: Tensor
    most_pages: int

    @property
    def dtype(self) -> torch.dtype:
        return self.tail_keys.dtype

    @property
    def device(self) -> torch.device:
        return self.tail_keys.device

    @property
    def batch_size(self) -> int:
        return self.tail_keys.shape[0]

    @property
    def sink_keys(self) -> Tensor:
        return self.tail_keys[:, :, :0]

    @property
    def sink_values(self) -> Tensor:
        return self.tail_values[:, :, :0]

    @property
    def most_tail_tokens(self) -> int:
        return self.tail_keys.shape[2]

    @property
    def total_pages(self) -> None:
        """Only the device knows."""

    @property
    def fewest_tail_tokens(self) -> int:
        """Queries are always the newest tokens of a tail, however many there are."""
        return self.tail_keys.shape[2]

    # -- for the reference backend, which asks the device ------------------------------------

    @property
    def pages_per_sequence(self) -> list[int]:
        return self.page_counts.tolist()

    @property
    def tails_per_sequence(self) -> list[int]:
        return self.tail_lengths.tolist()

    @property
    def sinks_per_sequence(self) -> list[int]:
        return [0] * self.batch_size

    @property
    def lengths(self) -> list[int]:
        counts = zip(self.pages_per_sequence, self.tails_per_sequence)
        return [PAGE_TOKENS * pages + tail for pages, tail in counts]

    def pages(self, table: Tensor) -> Tensor:
        return self.page_data.index_select(0, table.flatten())
