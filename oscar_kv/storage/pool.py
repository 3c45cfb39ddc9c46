"""Pages of one layer: one tensor, a free list and a count of how many sequences hold each page."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
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
        self.data: Tensor = torch.empty(
            (0, layout.num_kv_heads, layout.page_bytes), dtype=torch.uint8, device=device
        )
        """uint8 ``[capacity, H, page_bytes]``."""
        self._free: list[int] = []
        self._holders: Counter[int] = Counter()
        self._shares_data = False

    @property
    def capacity(self) -> int:
        """Pages allocated, in use or not."""
        return self.data.shape[0]

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
            self.data[torch.tensor(ids, device=self.data.device)] = pages
        return ids

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
        """The same pages on ``device``."""
        moved = self._twin()
        moved.data = self.data.to(device, non_blocking=True)
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        self._shares_data = True
        return self._twin()

    def _twin(self) -> PagePool:
        twin = copy.copy(self)
        twin._free, twin._holders = list(self._free), self._holders.copy()
        return twin

    def _grow(self, needed: int) -> None:
        """Moves to a tensor of its own that holds ``needed`` pages at least."""
        old = self.capacity
        capacity = max(needed, old + -(-old // 32)) if old and needed > old else max(needed, old)
        data = self.data.new_empty((capacity, *self.data.shape[1:]))
        data[:old] = self.data
        self.data, self._shares_data = data, False
        self._free[:0] = range(capacity - 1, old - 1, -1)
