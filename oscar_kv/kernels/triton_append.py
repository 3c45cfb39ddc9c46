"""``append`` of a decode step in Triton: one launch per layer, nothing for the host to wait for.

A program has one KV head of one sequence. Mostly it copies a token or a few into the tail; when the
tail is full it packs the oldest 128 tokens into the page that the block table names, and moves the
rest to the front. Lengths lie on the device. All programs of a sequence read them, so the last one
to arrive writes them.

A page whose token scales all heads share needs the keys of all heads: the tails then stay as they
are until the last program of the sequence arrives, which moves them all. What is new it takes from
the input, because the program that stores it may not have run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.kernels.device import capability
from oscar_kv.kernels.triton_encode import load_rows, token_squares, write_page
from oscar_kv.kernels.triton_pack_spec import pack_spec, signs, supports
from oscar_kv.kernels.triton_page import PAGE, page_pointer
from oscar_kv.storage.layout import PageLayout

MOST_NEW_TOKENS = 16
"""Tokens that one call can append to a sequence."""

_MOVED_AT_ONCE = tl.constexpr(32)


def append(
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    *,
    layout: PageLayout,
    tail_keys: Tensor,
    tail_values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    tail_lengths: Tensor,
    sink_lengths: Tensor,
    page_counts: Tensor,
    block_table: Tensor,
    pool: Tensor,
    arrivals: Tensor,
    nonfinite: Tensor,
) -> None:
    """Adds up to 16 tokens to every sequence, as :meth:`PackedKV.append` does.

    Allocates nothing and can be captured in a CUDA graph once it has been called. A page that may
    become complete must have its id in ``block_table`` already. Where a token has NaN or Inf in
    the key or the value of a head, zeros are stored for that head. ``B`` sequences, ``H`` KV heads;
    all tensors but ``keys`` and ``values`` are contiguous and on one device.

    Args:
        keys: ``[B, H, T, D]`` after RoPE, unrotated, in the tail's dtype; last stride 1.
        values: ``[B, H, T, E]``, likewise.
        counts: int32 ``[B]``, how many of the T tokens count, from the left; all if None.
        layout: the page layout.
        tail_keys, tail_values: ``[B, H, recent_tokens + 128, D or E]``.
        sink_keys, sink_values: ``[B, H, sink_tokens, D or E]``.
        tail_lengths, sink_lengths, page_counts: int32 ``[B]``.
        block_table: int32 ``[B, max pages]``.
        pool: uint8 ``[capacity, H, page_bytes]``.
        arrivals: int32 ``[B]``, zeros; zeros again afterwards.
        nonfinite: int32 ``[1]``; grows by the tokens of one head that were stored as zeros.

    Raises:
        ValueError: for more than 16 tokens, a last stride other than 1, or ``fit="unbiased"`` with
            ``token_scale="cross_head"``.
    """
    batch, heads, new_tokens, _ = keys.shape
    if new_tokens > MOST_NEW_TOKENS:
        raise ValueError(f"{new_tokens} new tokens: expected at most {MOST_NEW_TOKENS}")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("keys and values: expected channels next to each other in memory")
    if not supports(layout):
        raise ValueError('token_scale="cross_head" with fit="unbiased": no kernel appends that')
    if not new_tokens:
        return
    spec = pack_spec(layout)
    _append_kernel[(batch, heads)](
        keys,
        values,
        *keys.stride()[:3],
        *values.stride()[:3],
        counts,
        tail_keys,
        tail_values,
        sink_keys,
        sink_values,
        tail_lengths,
        sink_lengths,
        page_counts,
        block_table,
        block_table.stride(0),
        pool,
        arrivals,
        nonfinite,
        *signs(layout, keys.dtype, keys.device),
        spec=spec,
        new_tokens=new_tokens,
        rows=triton.next_power_of_2(new_tokens),
        recent=tail_keys.shape[2] - PAGE_TOKENS,
        sink_slots=sink_keys.shape[2],
        early=capability(keys.device) >= (9, 0),
        num_warps=spec.num_warps,
    )


@triton.jit(do_not_specialize=["table_stride"])
def _append_kernel(
    keys,
    values,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    counts,
    tail_keys,
    tail_values,
    sink_keys,
    sink_values,
    tail_lengths,
    sink_lengths,
    page_counts,
    block_table,
    table_stride,
    pool,
    arrivals,
    nonfinite,
    key_signs,
    value_signs,
    spec: tl.constexpr,
    new_tokens: tl.constexpr,
    rows: tl.constexpr,
    recent: tl.constexpr,
    sink_slots: tl.constexpr,
    early: tl.constexpr,
):
    if early:  # what comes next, attention, may be launched now; it waits for the end of this
        tl.extra.cuda.gdc_launch_dependents()
    page: tl.constexpr = spec.page
    heads: tl.constexpr = page.num_kv_heads
    slots: tl.constexpr = recent + PAGE
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    tail = tl.load(tail_lengths + sequence)
    sinks = tl.load(sink_lengths + sequence)
    pages = tl.load(page_counts + sequence)
    count = new_tokens
    if counts is not None:
        count = tl.load(counts + sequence)
    keys += sequence.to(tl.int64) * key_stride_b
    values += sequence.to(tl.int64) * value_stride_b
    owner = sequence.to(tl.int64) * heads + head

    token = tl.arange(0, rows)
    new_keys = keys + head * key_stride_h
    new_values = values + head * value_stride_h
    key, value, finite = _new_rows(
        new_keys + token * key_stride_t, new_values + token * value_stride_t, token < count, page
    )
    bad = tl.sum(((token < count) & (finite == 0)).to(tl.int32), 0)
    if bad > 0:
        tl.atomic_add(nonfinite, bad)
    to_sinks = 0
    if sink_slots > 0:
        to_sinks = tl.minimum(sink_slots - sinks, count)
        place = owner * sink_slots + sinks + token
        _store_rows(sink_keys, sink_values, place, key, value, token < to_sinks, page)
    position = tail - to_sinks + token
    kept = (token >= to_sinks) & (token < count)
    place = owner * slots + position
    _store_rows(tail_keys, tail_values, place, key, value, kept & (position < slots), page)

    filled = tail + count - to_sinks
    complete = filled >= slots
    if complete:
        tl.debug_barrier()
        squares = tl.zeros([PAGE], tl.float32)
        if page.shared_scale:
            row = tl.arange(0, PAGE)
            old = row < tail
            fresh = tl.where(old, 0, row - tail + to_sinks)
            for other in range(heads):
                stored = (sequence.to(tl.int64) * heads + other) * slots + row
                squares += token_squares(
                    tl.where(
                        old,
                        tail_keys + stored * page.head_dim,
                        keys + other * key_stride_h + fresh * key_stride_t,
                    ),
                    tl.where(
                        old,
                        tail_values + stored * page.value_dim,
                        values + other * value_stride_h + fresh * value_stride_t,
                    ),
                    page,
                )
        page_id = tl.load(block_table + sequence.to(tl.int64) * table_stride + pages)
        write_page(
            page_pointer(pool, page_id, head, page),
            head,
            tail_keys + owner * slots * page.head_dim,
            page.head_dim,
            tail_values + owner * slots * page.value_dim,
            page.value_dim,
            squares,
            key_signs,
            value_signs,
            spec,
        )
        if not page.shared_scale:
            _drop_packed(tail_keys, tail_values, owner * slots, recent, page)
            if new_tokens > 1:
                tl.debug_barrier()
                late = kept & (position >= slots)
                _store_rows(tail_keys, tail_values, place - PAGE, key, value, late, page)

    tl.debug_barrier()  # every thread has read the lengths
    if tl.atomic_add(arrivals + sequence, 1) == heads - 1:
        if page.shared_scale and complete:
            for other in range(heads):
                first = (sequence.to(tl.int64) * heads + other) * slots
                _drop_packed(tail_keys, tail_values, first, recent, page)
                if new_tokens > 1:
                    other_key, other_value, _ = _new_rows(
                        keys + other * key_stride_h + token * key_stride_t,
                        values + other * value_stride_h + token * value_stride_t,
                        token < count,
                        page,
                    )
                    tl.debug_barrier()
                    late = kept & (position >= slots)
                    front = first + position - PAGE
                    _store_rows(tail_keys, tail_values, front, other_key, other_value, late, page)
        tl.store(tail_lengths + sequence, tl.where(complete, filled - PAGE, filled))
        tl.store(sink_lengths + sequence, sinks + to_sinks)
        tl.store(page_counts + sequence, pages + complete.to(tl.int32))
        tl.store(arrivals + sequence, 0)


@triton.jit
def _new_rows(keys, values, exists, page: tl.constexpr):
    """Keys and values at pointers ``[N]``, zeros for a token that is not finite; which are."""
    key = load_rows(keys, exists, page.head_dim)
    value = load_rows(values, exists, page.value_dim)
    # Zero times NaN or Inf is NaN.
    zero = tl.sum(key.to(tl.float32) * 0.0, 1) + tl.sum(value.to(tl.float32) * 0.0, 1)
    finite = zero == 0
    return tl.where(finite[:, None], key, 0.0), tl.where(finite[:, None], value, 0.0), finite


@triton.jit
def _store_rows(keys, values, place, key, value, mask, page: tl.constexpr):
    """Stores rows at ``place [N]`` of contiguous buffers."""
    channel = tl.arange(0, key.shape[1])[None, :]
    target = keys + place.to(tl.int64)[:, None] * page.head_dim + channel
    tl.store(target, key, mask=mask[:, None] & (channel < page.head_dim))
    channel = tl.arange(0, value.shape[1])[None, :]
    target = values + place.to(tl.int64)[:, None] * page.value_dim + channel
    tl.store(target, value, mask=mask[:, None] & (channel < page.value_dim))


@triton.jit
def _drop_packed(keys, values, first, recent: tl.constexpr, page: tl.constexpr):
    """Moves the ``recent`` rows behind a packed page to the front, ``first`` of the buffers."""
    row = tl.arange(0, _MOVED_AT_ONCE)
    for begin in range(0, recent, _MOVED_AT_ONCE):
        exists = begin + row < recent
        place = first + begin + row
        key = load_rows(keys + (place + PAGE) * page.head_dim, exists, page.head_dim)
        value = load_rows(values + (place + PAGE) * page.value_dim, exists, page.value_dim)
        # What is overwritten now has been read: by the packing, or 128 rows ago by this loop.
        tl.debug_barrier()
        _store_rows(keys, values, place, key, value, exists, page)
