"""``PackedStates``: the keys and values that an attention layer holds, and how they are read.

A sequence is, from its first token to its newest: ``sink_tokens`` in full precision, whole pages
of 128 quantized tokens, and a full-precision tail. :class:`oscar_kv.storage.packed.PackedKV` lets
them grow and shrink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS, OscarConfig
from oscar_kv.storage.codec import decode_pages
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.offload import OffloadedPool, Staging
from oscar_kv.storage.ownership import owns_tensors
from oscar_kv.storage.pool import PagePool
from oscar_kv.storage.sequence import SequenceState, group_by_shape
from oscar_kv.storage.undo import Undo

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLES = ("block_table", "page_counts", "tail_lengths", "sink_lengths", "arrivals")
EXACT = ("tail_keys", "tail_values", "sink_keys", "sink_values")
BATCHED = (*EXACT, *TABLES)
"""Names of the tensors with a row for each sequence."""


def require_dtype(dtype: torch.dtype) -> None:
    """Raises TypeError unless full-precision tokens can be of this ``dtype``."""
    if dtype not in _DTYPES:
        raise TypeError(f"dtype={dtype}: expected one of {_DTYPES}")


class PackedStates:
    """A batch of quantized sequences as it is.

    Args:
        config: what is quantized and how.
        batch_size: sequences, B.
        num_kv_heads: KV heads, H.
        head_dim: key channels, D.
        value_head_dim: value channels, E; ``head_dim`` if omitted.
        dtype: of the full-precision tokens: float16, bfloat16 or float32.
        device: where everything lives.
        max_tokens: makes room for sequences of this length, and on a CPU for no more than that as
            long as they do not outgrow it; the pool grows as needed if omitted.
        staging: of this device; pages are then kept in CPU memory and come there for use.

    Raises:
        ValueError: for sizes that have no page layout, or the staging of another device.
        TypeError: for another dtype, or something else than a config.
    """

    @owns_tensors
    def __init__(
        self,
        config: OscarConfig,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_tokens: int | None = None,
        staging: Staging | None = None,
    ) -> None:
        if not isinstance(config, OscarConfig):
            raise TypeError(f"config is a {type(config).__name__}: expected an OscarConfig")
        require_dtype(dtype)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a positive integer")
        self.config = config
        self.layout = PageLayout(config, head_dim, num_kv_heads, value_head_dim)
        self.dtype = dtype
        device = torch.empty(0, device=device).device  # with its index
        if staging is not None and staging.device != device:
            raise ValueError(f"staging is on {staging.device}: this cache is on {device}")
        self.pool = (
            PagePool(self.layout, device)
            if staging is None
            else OffloadedPool(self.layout, staging)
        )
        if max_tokens is not None:
            self.pool.make_room(batch_size * SequenceState().pages_after(max_tokens, config))
        self._sequences = [SequenceState() for _ in range(batch_size)]
        self._device_leads = False
        """Whether kernels may be ahead of the host's lengths: from `reserve` on."""
        self._undo: Undo | None = None
        self.version = object()
        """Another object after every change but :meth:`advance`."""

        def full_precision(tokens: int, channels: int) -> Tensor:
            return torch.zeros(
                (batch_size, num_kv_heads, tokens, channels), dtype=dtype, device=device
            )

        slots = self.tail_capacity
        if max_tokens is not None and device.type == "cpu":  # kernels want all of it
            slots = min(slots, max_tokens)
        self.tail_keys = full_precision(slots, head_dim)
        """``[B, H, recent_tokens + 128, D]``, of which `tail_lengths` tokens are in use."""
        self.tail_values = full_precision(slots, self.layout.value_dim)
        self.sink_keys = full_precision(config.sink_tokens, head_dim)
        """``[B, H, sink_tokens, D]``, of which `sink_lengths` tokens are in use."""
        self.sink_values = full_precision(config.sink_tokens, self.layout.value_dim)
        self.block_table = torch.zeros((batch_size, 0), dtype=torch.int32, device=device)
        """int32 ``[B, max pages]``: ids of each sequence's pages in the pool, oldest first."""
        self.page_counts = torch.zeros(batch_size, dtype=torch.int32, device=device)
        """int32 ``[B]``: pages of each sequence."""
        self.tail_lengths = torch.zeros_like(self.page_counts)
        """int32 ``[B]``: tokens in the tail of each sequence."""
        self.sink_lengths = torch.zeros_like(self.page_counts)
        """int32 ``[B]``: full-precision first tokens of each sequence."""
        self.arrivals = torch.zeros_like(self.page_counts)
        """int32 ``[B]``: scratch of kernels that append, zeros between launches."""
        self.nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
        """int32 ``[1]``: how often such a kernel has stored zeros for NaN or Inf."""

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return len(self._sequences)

    @property
    def device(self) -> torch.device:
        """Where everything lives."""
        return self.tail_keys.device

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, known without asking the device."""
        return [sequence.length for sequence in self._sequences]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def pages_per_sequence(self) -> list[int]:
        """Pages of each sequence."""
        return [len(sequence.pages) for sequence in self._sequences]

    @property
    def total_pages(self) -> int:
        """Pages of all sequences, as far as the host has heard of them."""
        return sum(self.pages_per_sequence)

    @property
    def sinks_per_sequence(self) -> list[int]:
        """Full-precision first tokens of each sequence."""
        return [sequence.sinks for sequence in self._sequences]

    @property
    def tails_per_sequence(self) -> list[int]:
        """Full-precision newest tokens of each sequence."""
        return [sequence.tail for sequence in self._sequences]

    @property
    def most_pages(self) -> int:
        """Pages that a sequence has, or may have before the host hears of it."""
        return max(len(s.pages) + len(s.reserved) for s in self._sequences)

    @property
    def tail_capacity(self) -> int:
        """The most tokens in a tail: with as many, the oldest become a page."""
        return self.config.recent_tokens + PAGE_TOKENS

    @property
    def most_tail_tokens(self) -> int:
        """Likewise, tokens in the tail."""
        return self.tail_keys.shape[2] if self._device_leads else max(self.tails_per_sequence)

    @property
    def fewest_tail_tokens(self) -> int:
        """The fewest tokens in a tail, or that may be in one before the host hears of it."""
        fewest = min(self.tails_per_sequence)
        return min(fewest, self.config.recent_tokens) if self._device_leads else fewest

    @property
    def reserved_tokens(self) -> int:
        """Tokens that every sequence can still take from :meth:`reserve`."""
        if not self._device_leads:
            return 0
        return min(
            PAGE_TOKENS * len(s.reserved)
            + (self.config.recent_tokens + PAGE_TOKENS - 1 - s.tail)
            + (self.config.sink_tokens - s.sinks)
            for s in self._sequences
        )

    @property
    def places(self) -> list[tuple[int, torch.Size]]:
        """Address and shape of every tensor that kernels read and write, which a CUDA graph takes
        for granted."""
        tensors = [self.pool.data, *(getattr(self, name) for name in (*BATCHED, "nonfinite"))]
        return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        return sum(self.memory().values())

    def memory(self) -> dict[str, int]:
        """Bytes allocated, by kind.

        ``codes``, ``metadata`` (scales, centres, units), ``norms`` (token scales) and
        ``padding`` of the pages in use, ``tail`` for tokens in full precision, ``undo`` for what
        :meth:`crop` needs to take back the latest append, ``tables`` for block table and lengths,
        ``unused`` for allocated pages and tail slots that hold nothing.
        """
        heads = self.layout.num_kv_heads
        written = self.pool.used - sum(len(s.reserved) for s in self._sequences)
        kinds = {k: v * heads * written for k, v in self.layout.bytes_by_kind().items()}
        token = heads * (self.layout.head_dim + self.layout.value_dim) * self.dtype.itemsize
        tail = token * sum(s.sinks + s.tail for s in self._sequences)
        slots = token * self.batch_size * (self.tail_keys.shape[2] + self.sink_keys.shape[2])
        free_pages = (self.pool.capacity - written) * heads * self.layout.page_bytes
        tables = (getattr(self, name) for name in TABLES)
        return {
            **kinds,
            "tail": tail,
            "undo": 0 if self._undo is None else self._undo.nbytes,
            "tables": sum(t.numel() * t.itemsize for t in tables),
            "unused": slots - tail + free_pages,
        }

    @property
    def page_data(self) -> Tensor:
        """All pages of the pool, uint8 ``[capacity, H, page_bytes]``."""
        return self.pool.data

    def pages(self, table: Tensor) -> Tensor:
        """Copies of the pages in ``table`` (ids, any shape): uint8 ``[ids, H, page_bytes]``."""
        return self.pool.data.index_select(0, table.flatten())

    @owns_tensors
    def dense(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """All tokens, dequantized, in the original basis.

        Args:
            dtype: of the result; the model's dtype if omitted. float64 computes in float64.

        Returns:
            keys ``[B, H, T, D]`` and values ``[B, H, T, E]`` with ``T = max_length``; a shorter
            sequence is followed by zeros.
        """
        dtype = self.dtype if dtype is None else dtype
        shape = (self.batch_size, self.layout.num_kv_heads, self.max_length)
        keys = torch.zeros((*shape, self.layout.head_dim), dtype=dtype, device=self.device)
        values = torch.zeros((*shape, self.layout.value_dim), dtype=dtype, device=self.device)
        for group in group_by_shape(self._sequences, self.device):
            rows, sample = group.rows, group.sample
            sinks, count, end = sample.sinks, len(sample.pages), sample.length
            parts_k = [self.sink_keys[rows, :, :sinks].to(dtype)]
            parts_v = [self.sink_values[rows, :, :sinks].to(dtype)]
            if count:
                table = self.block_table[rows, :count]
                decoded = decode_pages(self.pages(table), self.layout, dtype)
                for parts, pages in zip((parts_k, parts_v), decoded):
                    by_row = pages.unflatten(0, table.shape).transpose(1, 2)
                    parts.append(by_row.flatten(2, 3))
            parts_k.append(self.tail_keys[rows, :, : sample.tail].to(dtype))
            parts_v.append(self.tail_values[rows, :, : sample.tail].to(dtype))
            keys[rows, :, :end] = torch.cat(parts_k, 2)
            values[rows, :, :end] = torch.cat(parts_v, 2)
        return keys, values

    def export(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """What is in use, for :func:`oscar_kv.storage.files.save_packed`.

        Returns:
            The sequences as plain values, their pages numbered from zero, and the tensors.
        """
        live = sorted({page for sequence in self._sequences for page in sequence.pages})
        number = {page: index for index, page in enumerate(live)}
        sequences = [
            {"sinks": s.sinks, "pages": [number[page] for page in s.pages], "tail": s.tail}
            for s in self._sequences
        ]
        tail, sinks = max(self.tails_per_sequence), max(self.sinks_per_sequence)
        return sequences, {
            "pages": self.pool.stored(live),
            "tail_keys": self.tail_keys[:, :, :tail],
            "tail_values": self.tail_values[:, :, :tail],
            "sink_keys": self.sink_keys[:, :, :sinks],
            "sink_values": self.sink_values[:, :, :sinks],
        }
