"""Pages in CPU memory, brought to their device a layer at a time.

A pool of this kind keeps its pages in pinned CPU memory. :class:`Staging` has two buffers on the
device, in which the pools of all layers take turns: while one layer attends, the pages of the next
are copied. Only new pages are copied back, since a written page never changes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.ownership import owns_tensors
from oscar_kv.storage.pool import PagePool

_CHUNK_BYTES = 4 << 20
"""CPU memory grows by so much: a power of two, to which pinned memory is rounded anyway."""


class OffloadedPool(PagePool):
    """A pool whose pages stay in CPU memory and are copied to ``staging`` for use."""

    def __init__(self, layout: PageLayout, staging: Staging) -> None:
        super().__init__(layout, staging.device)
        self.staging = staging
        self._chunks: list[Tensor] = []
        self._per_chunk = max(1, _CHUNK_BYTES // (layout.num_kv_heads * layout.page_bytes))

    @property
    def data(self) -> Tensor:
        """uint8 ``[capacity, H, page_bytes]`` on the device, until other pools are used."""
        return self.staging.fetch(self)

    @property
    def capacity(self) -> int:
        return len(self._chunks) * self._per_chunk

    @property
    def host_nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def prefetch(self) -> None:
        self.staging.prefetch(self)

    def store(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        data = self.data
        for host, place in self._runs(ids):
            host.copy_(data[place], non_blocking=True)

    def load_into(self, data: Tensor) -> None:
        """Copies all pages in use to ``data``, uint8 ``[capacity, H, page_bytes]``."""
        for host, place in self._runs(self._holders):
            data[place].copy_(host, non_blocking=True)

    def stored(self, ids: Sequence[int]) -> Tensor:
        """Copies of pages, uint8 ``[n, H, page_bytes]``, in CPU memory."""
        self.staging.synchronize()
        pages = torch.empty((len(ids), *self.page_shape), dtype=torch.uint8)
        for number, page in enumerate(ids):
            pages[number] = self._chunks[page // self._per_chunk][page % self._per_chunk]
        return pages

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedPool:
        copied = copy.copy(self)  # whose pages are copies, as __setstate__ makes them
        copied.staging = copy.deepcopy(self.staging, memo)
        copied._free, copied._holders = list(self._free), self._holders.copy()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self.staging.synchronize()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Pinned, which what comes out of a pickle is not.
        self._chunks = [self._new_chunk().copy_(chunk) for chunk in self._chunks]

    def _extend(self, needed: int) -> None:
        more = -(-needed // self._per_chunk) - len(self._chunks)
        self._chunks += [self._new_chunk() for _ in range(more)]

    def _new_chunk(self) -> Tensor:
        pinned = self.staging.device.type == "cuda"
        return torch.empty(
            (self._per_chunk, *self.page_shape), dtype=torch.uint8, pin_memory=pinned
        )

    def _runs(self, ids: Iterable[int]) -> Iterator[tuple[Tensor, slice]]:
        """Consecutive pages in CPU memory, and which of ``data`` they are."""
        numbered = enumerate(sorted(ids))
        for _, run in groupby(numbered, lambda at: (at[1] - at[0], at[1] // self._per_chunk)):
            pages = [page for _, page in run]
            chunk, row = divmod(pages[0], self._per_chunk)
            host = self._chunks[chunk][row : row + len(pages)]
            yield host, slice(pages[0], pages[-1] + 1)


class _Buffer:
    """Device memory with the pages of one pool."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self.owner: weakref.ref[OffloadedPool] | None = None
        self.loaded: torch.cuda.Event | None = None
        """When the pages are there, where they are copied on a stream of their own."""

    def make_room(self, nbytes: int) -> None:
        """Allocates at least ``nbytes``; what is there stays."""
        old = self.bytes.numel()
        if nbytes > old:
            larger = self.bytes.new_empty(max(nbytes, old + old // 8))
            larger[:old] = self.bytes
            self.bytes = larger

    def view(self, pool: OffloadedPool) -> Tensor:
        """Its beginning as pages of ``pool``."""
        return self.bytes[: pool.nbytes].view(pool.capacity, *pool.page_shape)


class Staging:
    """Two buffers on ``device`` that pools of offloaded pages share.

    Whatever is asked for takes the place of what was used least recently. On a CUDA device pages
    come on a stream of their own. That stream first waits for all that was launched before, which
    may still read what is overwritten, or write the pages to be copied; what is launched after
    :meth:`fetch` waits for the copy.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._buffers = [_Buffer(torch.device(device)) for _ in range(2)]
        """The least recently used one first."""
        self.device = self._buffers[0].bytes.device
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(buffer.bytes.nbytes for buffer in self._buffers)

    @owns_tensors
    def fetch(self, pool: OffloadedPool) -> Tensor:
        """All pages of ``pool``, uint8 ``[capacity, H, page_bytes]``, for kernels launched now."""
        buffer = self._buffer_with(pool)
        if buffer.loaded is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.loaded)
        buffer.make_room(pool.nbytes)
        return buffer.view(pool)

    @owns_tensors
    def prefetch(self, pool: OffloadedPool) -> None:
        """Begins to bring the pages of ``pool``, if they are not here."""
        if pool.used:
            self._buffer_with(pool)

    def synchronize(self) -> None:
        """Waits until everything that was copied has arrived."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def __reduce__(self) -> tuple[type[Staging], tuple[torch.device]]:
        return Staging, (self.device,)  # a copy, or what comes out of a pickle, begins empty

    def _buffer_with(self, pool: OffloadedPool) -> _Buffer:
        owned = [b for b in self._buffers if b.owner is not None and b.owner() is pool]
        buffer = owned[0] if owned else self._load(pool, self._buffers[0])
        self._buffers.sort(key=lambda b: b is buffer)
        return buffer

    def _load(self, pool: OffloadedPool, buffer: _Buffer) -> _Buffer:
        buffer.owner = None  # for as long as the copy may fail
        buffer.make_room(pool.nbytes)
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
            # The memory may be freed with the copy still to come.
            buffer.bytes.record_stream(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            pool.load_into(buffer.view(pool))
            if stream is not None:
                buffer.loaded = torch.cuda.Event()
                buffer.loaded.record(stream)
        buffer.owner = weakref.ref(pool)
        return buffer


class StagingByDevice(dict[torch.device, Staging]):
    """The staging of each device that a layer is on, made when it is first needed."""

    def __missing__(self, device: torch.device) -> Staging:
        self[device] = Staging(device)
        return self[device]
