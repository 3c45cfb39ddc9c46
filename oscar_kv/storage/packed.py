"""``PackedKV``: how the quantized sequences of an attention layer grow and shrink.

The tail of a sequence holds ``recent_tokens`` to ``recent_tokens + 127`` tokens; when 128 tokens
have left the recent window they become a page. Each token is quantized once.

Lengths are kept twice: as device tensors for the kernels and as Python integers for bookkeeping,
so that nothing here waits for the device, but for the check that ``check_finite`` asks for. Once
:meth:`PackedKV.reserve` has set pages aside, decode steps need no host at all: a CUDA graph can
replay them, and :meth:`PackedKV.advance` brings the integers up to date.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.storage.checks import (
    as_integers,
    check_lengths,
    check_restorable,
    check_states,
    require_storable,
    zero_nonfinite,
)
from oscar_kv.storage.codec import decode_pages, encode_into
from oscar_kv.storage.offload import OffloadedPool
from oscar_kv.storage.ownership import owns_tensors
from oscar_kv.storage.sequence import SequenceState, advanced, group_by_shape
from oscar_kv.storage.states import BATCHED, EXACT, PackedStates, require_dtype
from oscar_kv.storage.undo import Undo
from oscar_kv.storage.write import PackFunction, StepFunction, Write, plan_write

_Tail = tuple[slice, Tensor, Tensor]
"""Rows, and the first keys and values ``[rows, H, T, channels]`` of their tails."""


class PackedKV(PackedStates):
    """A batch of quantized sequences, grown by :meth:`append`. Made as :class:`PackedStates` is."""

    @owns_tensors
    def append(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        pack: PackFunction = encode_into,
    ) -> tuple[Tensor, Tensor]:
        """Adds new tokens to every sequence. On an error nothing has changed.

        Args:
            keys: ``[B, H, T, D]`` after RoPE, unrotated, in the dtype of this cache.
            values: ``[B, H, T, E]``.
            lengths: how many of the T tokens of each sequence count, from the left; all if
                omitted.
            pack: packs whole pages into the pool, as :func:`encode_into` does.

        Returns:
            The keys and values that were stored: those given, but for tokens made zero because
            ``config.check_finite`` is off.

        Raises:
            ValueError: for wrong shapes, lengths or devices, and for NaN or Inf where
                ``config.check_finite`` is set.
            TypeError: for another dtype than the cache's.
        """
        counts = self._checked_counts(keys, values, lengths)
        if self.config.check_finite:
            require_storable(keys, values, counts, self.config)
        else:
            keys, values = zero_nonfinite(keys, values)
        undo = self._undo_of(counts)
        self._release_reserved()
        before = self._sequences, self._undo
        groups = group_by_shape(self._sequences, self.device, counts)
        writes = [plan_write(self, group, keys, values) for group in groups]
        self._widen_table(max(len(w.group.sample.pages) + w.pages for w in writes))
        self._widen_tail(max(w.tail_begin + w.tail[0].shape[2] for w in writes))
        ids = self.pool.allocate(sum(write.new_pages for write in writes))
        try:
            grown = self._grown(counts, ids)
            for write in writes:
                if write.pages:
                    page_ids = self._list_pages(write, grown)
                    pack(self.pool.data, page_ids, *write.whole, self.layout, pages=write.pages)
            self.pool.store(ids)
            for write in writes:
                self._commit(write)
            self._sequences, self._undo = grown, self._kept(undo, counts)
            self._sync_lengths()
        except BaseException:  # Ctrl-C, too
            self._sequences, self._undo = before
            for write in writes:
                self._take_back(write)
            self._sync_lengths()
            self.pool.release(ids)
            raise
        return keys, values

    @owns_tensors
    def append_step(
        self,
        keys: Tensor,
        values: Tensor,
        step: StepFunction,
        *,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`append`, by a kernel that decides from the lengths on the device.

        While a CUDA graph is captured nothing is checked and the host's lengths stay: replay the
        graph, then call :meth:`advance`. Tokens with NaN or Inf are stored as zeros by the kernel,
        which counts them in `nonfinite`; outside of a capture ``check_finite`` refuses them first.

        Args:
            keys: ``[B, H, T, D]``, T small enough for the kernel and at most 128.
            values: ``[B, H, T, E]``.
            step: ``step(packed, keys, values, counts)``, which writes tokens, pages and lengths on
                the device; ``counts`` is int32 ``[B]`` or None if all T count.
            lengths: as in :meth:`append`.
        """
        counts = self._checked_counts(keys, values, lengths)
        uniform = min(counts) == keys.shape[2]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not uniform:
                raise ValueError("lengths: expected none while a CUDA graph is captured")
            if not self._device_leads:
                raise ValueError("a CUDA graph is captured: call reserve() first")
            step(self, keys, values, None)
            return keys, values
        if self.config.check_finite:
            require_storable(keys, values, counts, self.config)
        self._widen_tail(self.tail_capacity)
        undo = self._undo_of(counts)
        self.version = object()
        for row, (sequence, count) in enumerate(zip(self._sequences, counts)):
            missing = sequence.pages_missing(count, self.config)
            if missing:
                self._widen_table(len(sequence.pages) + missing)
                sequence.reserved += tuple(self.pool.allocate(missing))
                self.block_table[row, len(sequence.pages)].fill_(sequence.reserved[0])
        numbers = None if uniform else torch.tensor(counts, dtype=torch.int32, device=self.device)
        before = self._sequences, self._undo
        try:
            step(self, keys, values, numbers)
            self._sequences, completed = advanced(before[0], counts, self.config)
            self._undo = self._kept(undo, counts)
            self.pool.store(completed)
        except BaseException:  # Ctrl-C, too
            self._sequences, self._undo = before
            if undo is not None:
                self._write_tails([(slice(None), undo.tail_keys, undo.tail_values)])
            self._sync_lengths()
            raise
        if not self.config.check_finite and keys.shape[2] > self.config.recent_tokens:
            return zero_nonfinite(keys, values)
        return keys, values

    @owns_tensors
    def reserve(self, tokens: int) -> None:
        """Sets pages aside so that every sequence can take ``tokens`` more in steps.

        From then on the steps move no memory and need nothing from the host, as a CUDA graph asks.
        A prompt, a rollback or a selection gives up what is left. The latest append is for good:
        the copy that would take it back exactly is as large as the tail.

        Raises:
            ValueError: for a negative number, or if pages are offloaded: the host moves these.
        """
        if tokens < 0:
            raise ValueError(f"tokens={tokens}: expected a number >= 0")
        if isinstance(self.pool, OffloadedPool):
            raise ValueError("reserve: pages are offloaded, so every step needs the host")
        self._widen_tail(self.tail_capacity)
        self._device_leads = True
        self._undo = None
        self.version = object()
        wanted = [sequence.pages_missing(tokens, self.config) for sequence in self._sequences]
        ids = self.pool.allocate(sum(wanted))
        for sequence, count in zip(self._sequences, wanted):
            sequence.reserved += tuple(ids[:count])
            ids = ids[count:]
        width = self.most_pages
        self._widen_table(width)
        rows = [(list(s.pages + s.reserved) + [0] * width)[:width] for s in self._sequences]
        self.block_table[:, :width] = torch.tensor(rows, dtype=torch.int32).to(self.device)

    def advance(self, tokens: int) -> None:
        """Brings the host's lengths up to date after ``tokens`` were appended on the device.

        Raises:
            ValueError: if that is more than was reserved.
        """
        if not 0 <= tokens <= self.reserved_tokens:
            raise ValueError(f"tokens={tokens}: {self.reserved_tokens} are reserved")
        self._undo = None
        self._sequences, _ = advanced(self._sequences, [tokens] * self.batch_size, self.config)

    @owns_tensors
    def crop(self, lengths: int | Sequence[int]) -> None:
        """Keeps only the first ``lengths`` tokens of every sequence (one number, or one each).

        Pages that remain whole stay as they are. A page that is cut is dequantized and its
        remaining tokens return to the tail, from where they are quantized again once their page
        is complete: the one exception to "each token is quantized once". Taking back just the
        latest append is exact, whatever it has packed, until :meth:`reserve`.

        Raises:
            ValueError: if a sequence has fewer tokens.
        """
        each = lengths if isinstance(lengths, Sequence) else [lengths] * self.batch_size
        self._release_reserved()
        wanted = as_integers("lengths", each)
        if len(wanted) != self.batch_size or any(
            not 0 <= new <= old for new, old in zip(wanted, self.lengths)
        ):
            raise ValueError(f"lengths={lengths!r}: expected values within {self.lengths}")
        if self._undo is not None and wanted == self._undo.lengths:
            everything = slice(None), self._undo.tail_keys, self._undo.tail_values
            return self._shrink(self._undo.sequences, [everything])
        shorter, cuts = [], []
        for row, (length, sequence) in enumerate(zip(wanted, self._sequences)):
            sinks = min(sequence.sinks, length)
            whole, rest = divmod(length - sinks, PAGE_TOKENS)
            if whole < len(sequence.pages) and rest:
                page = self.pool.stored([sequence.pages[whole]]).to(self.device)
                states = decode_pages(page, self.layout, self.dtype)
                cuts.append((slice(row, row + 1), *(x[:, :, :rest] for x in states)))
            pages = sequence.pages[:whole]
            shorter.append(SequenceState(sinks, pages, length - sinks - PAGE_TOKENS * len(pages)))
        return self._shrink(shorter, cuts)

    @owns_tensors
    def select(self, rows: Sequence[int]) -> None:
        """Replaces the batch by these of its sequences, in this order, repeats allowed.

        Beam search's reorder, repeat and select are all this. Pages are shared, not copied.

        Raises:
            ValueError: if ``rows`` is empty or names a sequence that does not exist.
        """
        rows = as_integers("rows", rows)
        if not rows or any(not 0 <= row < self.batch_size for row in rows):
            raise ValueError(f"rows={rows!r}: expected indices below {self.batch_size}")
        self._release_reserved()
        self._undo = None
        index = torch.tensor(rows, device=self.device)
        tensors = {name: getattr(self, name).index_select(0, index) for name in BATCHED}
        earlier, self._sequences = self._sequences, [replace(self._sequences[row]) for row in rows]
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        for sequence in self._sequences:
            self.pool.hold(sequence.pages)
        for sequence in earlier:
            self.pool.release(sequence.pages)

    def reset(self) -> None:
        """Forgets every token; keeps the memory."""
        self.crop(0)

    @owns_tensors
    def widen(self, dtype: torch.dtype) -> None:
        """Holds full-precision tokens in ``dtype`` from now on. Pages have none.

        Raises:
            TypeError: for another dtype than float16, bfloat16 or float32.
        """
        if dtype == self.dtype:
            return
        require_dtype(dtype)
        for name in EXACT:
            setattr(self, name, getattr(self, name).to(dtype))
        self.dtype, self.version = dtype, object()

    @owns_tensors
    def to(self, device: torch.device | str) -> PackedKV:
        """A batch of the same sequences on ``device``, none of it offloaded. Do not append to both:
        tensors that are there already are shared."""
        moved = copy.copy(self)
        moved._sequences = [replace(sequence) for sequence in self._sequences]
        moved.pool = self.pool.to(device)
        moved._release_reserved()
        moved._undo = None
        for name in (*BATCHED, "nonfinite"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    @owns_tensors
    def __deepcopy__(self, memo: dict[int, Any]) -> PackedKV:
        """The same sequences, which go their own way from here on. Pages stay shared until one of
        the two writes one (see :class:`PagePool`)."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._sequences = [replace(sequence) for sequence in self._sequences]
        twin.pool = copy.deepcopy(self.pool, memo)
        twin._release_reserved()
        twin._undo = None
        for name in (*BATCHED, "nonfinite"):
            setattr(twin, name, getattr(self, name).clone())
        return twin

    @owns_tensors
    def restore(self, sequences: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Fills an empty cache with what :meth:`export` returned."""
        slots = self.sink_keys.shape[2], self.tail_keys.shape[2]
        check_restorable(sequences, tensors["pages"], self.layout, *slots)
        ids = self.pool.add(tensors["pages"])
        self._sequences = [
            SequenceState(s["sinks"], tuple(ids[index] for index in s["pages"]), s["tail"])
            for s in sequences
        ]
        for row, sequence in enumerate(self._sequences):
            self.pool.hold(sequence.pages)
            self._widen_table(len(sequence.pages))
            self.block_table[row, : len(sequence.pages)] = torch.tensor(sequence.pages)
        self.pool.release(ids)
        tail = max(self.tails_per_sequence)
        self.tail_keys[:, :, :tail] = tensors["tail_keys"]
        self.tail_values[:, :, :tail] = tensors["tail_values"]
        sinks = max(self.sinks_per_sequence)
        self.sink_keys[:, :, :sinks] = tensors["sink_keys"]
        self.sink_values[:, :, :sinks] = tensors["sink_values"]
        self._sync_lengths()

    # -- inside -----------------------------------------------------------------------------

    def _checked_counts(
        self, keys: Tensor, values: Tensor, lengths: Sequence[int] | None
    ) -> list[int]:
        tokens = check_states(
            {"keys": keys, "values": values},
            {"keys": self.layout.head_dim, "values": self.layout.value_dim},
            self.batch_size,
            self.layout.num_kv_heads,
            self.dtype,
            self.device,
        )
        return check_lengths(lengths, self.batch_size, tokens)

    def _grown(self, counts: Sequence[int], ids: list[int]) -> list[SequenceState]:
        """The sequences with so many more tokens, and new pages in order of the rows."""
        grown = [replace(sequence) for sequence in self._sequences]
        for sequence, count in zip(grown, counts):
            missing = sequence.pages_missing(count, self.config)
            sequence.reserved, ids = tuple(ids[:missing]), ids[missing:]
        return advanced(grown, counts, self.config)[0]

    def _undo_of(self, counts: Sequence[int]) -> Undo | None:
        """What an append of ``counts`` is about to overwrite: the tail that it makes a page of."""
        packs = any(
            sequence.pages_after(count, self.config) > len(sequence.pages)
            for sequence, count in zip(self._sequences, counts)
        )
        if not packs:
            return None
        tail = max(self.tails_per_sequence)
        return Undo(
            [replace(sequence, reserved=()) for sequence in self._sequences],
            self.tail_keys[:, :, :tail].clone(),
            self.tail_values[:, :, :tail].clone(),
        )

    def _kept(self, undo: Undo | None, counts: Sequence[int]) -> Undo | None:
        """``undo``, where a later crop would miss it.

        After one token that leaves a recent window, a crop stays within it, and whatever comes next
        would complete the same page.
        """
        return undo if max(counts) > min(1, self.config.recent_tokens) else None

    def _shrink(self, shorter: list[SequenceState], tails: list[_Tail]) -> None:
        """Goes over to shorter sequences, some with another beginning of their tail."""
        before = self._sequences, self._undo
        kept = [
            (rows, self.tail_keys[rows, :, :n].clone(), self.tail_values[rows, :, :n].clone())
            for rows, n in ((rows, keys.shape[2]) for rows, keys, _ in tails)
        ]
        try:
            self._write_tails(tails)
            self._sequences, self._undo = shorter, None
            self._sync_lengths()
        except BaseException:  # Ctrl-C, too
            self._sequences, self._undo = before
            self._write_tails(kept)
            self._sync_lengths()
            raise
        for earlier, now in zip(before[0], shorter):
            self.pool.release(earlier.pages[len(now.pages) :])

    def _write_tails(self, tails: list[_Tail]) -> None:
        for rows, keys, values in tails:
            self.tail_keys[rows, :, : keys.shape[2]] = keys
            self.tail_values[rows, :, : values.shape[2]] = values

    def _release_reserved(self) -> None:
        self._device_leads = False
        self.version = object()
        for sequence in self._sequences:
            self.pool.release(sequence.reserved)
            sequence.reserved = ()

    def _list_pages(self, write: Write, grown: list[SequenceState]) -> Tensor:
        """Enters the pages that a group of sequences gains into the block table; their ids."""
        first = len(write.group.sample.pages)
        ids = [grown[row].pages[first:] for row in write.group.numbers]
        new = torch.tensor(ids, dtype=torch.int32).to(self.device)
        self.block_table[write.group.rows, first : first + write.pages] = new
        return new.flatten()

    def _commit(self, write: Write) -> None:
        """Writes the sinks and the tail of one planned append."""
        rows, before = write.group.rows, write.group.sample
        sinks = write.sinks[0].shape[2]
        if sinks:
            target = slice(before.sinks, before.sinks + sinks)
            self.sink_keys[rows, :, target], self.sink_values[rows, :, target] = write.sinks
        target = slice(write.tail_begin, write.tail_begin + write.tail[0].shape[2])
        self.tail_keys[rows, :, target], self.tail_values[rows, :, target] = write.tail

    def _take_back(self, write: Write) -> None:
        """Puts back the tail that :meth:`_commit` may have overwritten: pages are made of it."""
        if write.pages:
            rows, tail = write.group.rows, write.group.sample.tail
            for buffer, states in zip((self.tail_keys, self.tail_values), write.whole):
                buffer[rows, :, :tail] = states[:, :, :tail]

    def _widen_table(self, width: int) -> None:
        old = self.block_table.shape[1]
        if width > old:
            table = self.block_table.new_zeros(self.batch_size, width + width // 8)
            table[:, :old] = self.block_table
            self.block_table = table

    def _widen_tail(self, tokens: int) -> None:
        """Makes all the room that a tail may need, if there is none for so many."""
        missing = self.tail_capacity - self.tail_keys.shape[2]
        if tokens > self.tail_keys.shape[2]:
            for name in ("tail_keys", "tail_values"):
                setattr(self, name, F.pad(getattr(self, name), (0, 0, 0, missing)))

    def _sync_lengths(self) -> None:
        """Brings the device-side lengths up to the host's."""
        for tensor, numbers in (
            (self.page_counts, self.pages_per_sequence),
            (self.tail_lengths, self.tails_per_sequence),
            (self.sink_lengths, self.sinks_per_sequence),
        ):
            if len(set(numbers)) == 1:
                tensor.fill_(numbers[0])
            else:
                tensor.copy_(torch.tensor(numbers, dtype=torch.int32))
