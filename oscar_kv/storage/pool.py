"""Pages of one layer: one tensor, a free list and a count of how many sequences hold each page."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from oscar_kv.storage.layout import PageLayout


class PagePool:
    """Fixed-size pages, addressed by id. A written page is immutable, so sequences may share it.

    So may copies of a pool (``copy.deepcopy``): they have one tensor until one of them needs a page
    to write, and moves to a tensor of its own.

    Growing copies the pool once per 1/32 of its size, which is negligible beside the attention
    that reads all of it every step; what is allocated beyond need stays below that 1/32.
    """

    def __init__(self, layout: PageLayout, device: torch.device) -> None:
        self.layout = layout
        self.page_shape = layout.num_kv_heads, layout.page_bytes
        self._data = torch.empty((0, *self.page_shape), dtype=torch.uint8, device=device)
        self._free: list[int] = []
        self._holders: Counter[int] = Counter()
        self._shares_data = False

    @property
    def data(self) -> Tensor:
        """uint8 ``[capacity, H, page_bytes]``."""
        return self._data

    @property
    def capacity(self) -> int:
        """Pages allocated, in use or not."""
        return self._data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.layout.num_kv_heads * self.layout.page_bytes

    @property
    def host_nbytes(self) -> int:
        """How many of these are in CPU memory for want of room on the device."""
        return 0

    @property
    def used(self) -> int:
        """Pages in use, each counted once however many sequences hold it."""
        return self.capacity - len(self._free)

    def make_room(self, pages: int) -> None:
        """Allocates so that ``pages`` pages fit without growing."""
        if pages > self.capacity:
            self._grow(pages)

    def allocate(self, count: int) -> list[int]:
        """Ids of ``count`` pages to be written, each with one holder."""
        if count > len(self._free) or (count and self._shares_data):
            self._grow(self.used + count)
        ids = [self._free.pop() for _ in range(count)]
        self._holders.update(ids)
        return ids

    def add(self, pages: Tensor) -> list[int]:
        """Stores new pages (uint8 ``[n, H, page_bytes]``), each with one holder; returns ids."""
        ids = self.allocate(pages.shape[0])
        if ids:
            data = self.data
            data[torch.tensor(ids, device=data.device)] = pages.to(data.device)
            self.store(ids)
        return ids

    def prefetch(self) -> None:
        """Begins to bring the pages to where ``data`` is, if they are kept elsewhere."""

    def store(self, ids: Sequence[int]) -> None:
        """Has new pages, which were written to ``data``, kept wherever pages are kept."""

    def stored(self, ids: Sequence[int]) -> Tensor:
        """Copies of pages, uint8 ``[n, H, page_bytes]``, on the device where pages are kept."""
        index = torch.tensor(ids, dtype=torch.int32, device=self._data.device)
        return self._data.index_select(0, index)

    def hold(self, ids: Iterable[int]) -> None:
        """Adds one holder to each page."""
        self._holders.update(ids)

    def release(self, ids: Iterable[int]) -> None:
        """Removes one holder from each page; a page without holders becomes free."""
        for page in ids:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free.append(page)

    def to(self, device: torch.device | str) -> PagePool:
        """A pool with the same pages on ``device``."""
        moved = PagePool(self.layout, torch.device(device))
        moved._free, moved._holders = list(self._free), self._holders.copy()
        moved._data = self.data.to(device, copy=True)
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        self._shares_data = True
        twin = copy.copy(self)
        twin._free, twin._holders = list(self._free), self._holders.copy()
        return twin

    def _grow(self, needed: int) -> None:
        """Moves to a tensor of its own that holds ``needed`` pages at least."""
        old = self.capacity
        self._extend(needed)
        self._free[:0] = range(self.capacity - 1, old - 1, -1)

    def _extend(self, needed: int) -> None:
        """Allocates so that ``capacity`` is ``needed`` pages or more, in a tensor of its own."""
        old = self.capacity
        capacity = max(needed, old + -(-old // 32)) if old and needed > old else max(needed, old)
        data = self._data.new_empty((capacity, *self.page_shape))
        data[:old] = self._data
        self._data, self._shares_data = data, False
