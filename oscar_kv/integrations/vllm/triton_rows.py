"""What happens to rows before and after attention, in Triton: see :class:`RowOperations`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.integrations.vllm.rows import Ring, Rows

_PAGE = tl.constexpr(PAGE_TOKENS)
_TOKENS = 32
"""Slots, or queries, of a program."""
_ENTRIES = 1024
"""Of a block table, copied at a time."""


def locate(rows: Rows, query_begins: Tensor, lengths: Tensor, block_table: Tensor) -> None:
    """See :meth:`RowOperations.locate`. Entries of tables that nobody reads stay as they are."""
    _locate_kernel[(len(rows.requests),)](
        rows.requests,
        rows.blocks,
        query_begins,
        lengths,
        block_table,
        block_table.stride(0),
        rows.page_counts,
        rows.tail_lengths,
        rows.old_lengths,
        rows.first_tokens,
        rows.lengths,
        rows.complete_pages,
        rows.block_table,
        rows.block_table.stride(0),
        block_table.shape[1],
        _ENTRIES,
    )


def open_rows(
    rows: Rows, query: Tensor, keys: Tensor, values: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`RowOperations.open_rows`. Slots that are not in use stay as they are."""
    query, keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (query, keys, values))
    count, num_queries = len(rows.requests), rows.num_queries
    (num_heads, head_dim), (num_kv_heads, value_dim) = query.shape[1:], values.shape[1:]
    tails = (count, num_kv_heads, PAGE_TOKENS)
    tail_keys, tail_values = (keys.new_empty((*tails, x)) for x in (head_dim, value_dim))
    queries = query.new_empty((count, num_heads, num_queries, head_dim))
    group = num_heads // num_kv_heads
    parts = PAGE_TOKENS // _TOKENS + triton.cdiv(group * num_queries, _TOKENS)
    # Few new tokens never take the place of one that is still read: the ring has room for both.
    few = num_queries < PAGE_TOKENS and num_queries <= ring.tokens - PAGE_TOKENS + 1
    for loads, stores in [(True, True)] if few else [(True, False), (False, True)]:
        _open_kernel[(count, num_kv_heads, parts if loads else PAGE_TOKENS // _TOKENS)](
            rows.requests,
            rows.page_counts,
            rows.tail_lengths,
            rows.old_lengths,
            rows.first_tokens,
            rows.lengths,
            query,
            query.stride(0),
            query.stride(1),
            keys,
            keys.stride(0),
            keys.stride(1),
            values,
            values.stride(0),
            values.stride(1),
            ring.data,
            *ring.data.stride()[:3],
            ring.table,
            ring.table.stride(0),
            queries,
            tail_keys,
            tail_values,
            num_queries,
            group=group,
            head_dim=head_dim,
            value_dim=value_dim,
            padded_head_dim=triton.next_power_of_2(head_dim),
            padded_value_dim=triton.next_power_of_2(value_dim),
            block_tokens=ring.block_tokens,
            ring_blocks=ring.blocks,
            tokens=_TOKENS,
            loads=loads,
            stores=stores,
        )
    return queries, tail_keys, tail_values


def close_rows(rows: Rows, result: Tensor, output: Tensor) -> None:
    """See :meth:`RowOperations.close_rows`."""
    count, num_heads, num_queries, value_dim = result.shape
    _close_kernel[(count, triton.cdiv(num_heads * num_queries, _TOKENS))](
        rows.tail_lengths,
        rows.old_lengths,
        rows.first_tokens,
        result.contiguous(),
        output,
        output.stride(0),
        output.stride(1),
        num_queries,
        num_heads=num_heads,
        value_dim=value_dim,
        padded_value_dim=triton.next_power_of_2(value_dim),
        tokens=_TOKENS,
    )


@triton.jit(
    do_not_specialize=["table_stride", "row_table_stride", "width"],
    do_not_specialize_on_alignment=["requests", "blocks"],
)
def _locate_kernel(
    requests,
    blocks,
    query_begins,
    lengths,
    table,
    table_stride,
    page_counts,
    tail_lengths,
    old_lengths,
    first_tokens,
    row_lengths,
    complete_pages,
    row_table,
    row_table_stride,
    width,
    entries: tl.constexpr,
):
    row = tl.program_id(0)
    request = tl.load(requests + row)
    begin = tl.load(query_begins + request)
    count = tl.load(query_begins + request + 1) - begin
    length = tl.load(lengths + request)
    first = tl.maximum(length - count, 0)
    block = first // _PAGE + tl.load(blocks + row)
    start = block * _PAGE
    end = tl.minimum(length, start + _PAGE)
    exists = (count > 0) & (end > tl.maximum(first, start))
    pages = tl.where(exists, block, 0)
    table += request.to(tl.int64) * table_stride
    own_page = tl.load(table + tl.minimum(block, width - 1))
    tl.store(page_counts + row, pages)
    tl.store(tail_lengths + row, tl.where(exists, end - start, 0))
    tl.store(old_lengths + row, tl.where(exists, tl.maximum(first - start, 0), 0))
    tl.store(first_tokens + row, tl.where(exists, begin + start - first, 0))
    tl.store(row_lengths + row, tl.where(exists, length, 0))
    tl.store(complete_pages + row, tl.where(exists & (end == start + _PAGE), own_page, -1))
    row_table += row.to(tl.int64) * row_table_stride
    for first_entry in range(0, pages, entries):
        entry = first_entry + tl.arange(0, entries)
        tl.store(row_table + entry, tl.load(table + entry, mask=entry < pages), mask=entry < pages)


@triton.jit(do_not_specialize=["ring_table_stride", "num_queries"])
def _open_kernel(
    requests,
    page_counts,
    tail_lengths,
    old_lengths,
    first_tokens,
    lengths,
    query,
    query_stride_t,
    query_stride_h,
    keys,
    key_stride_t,
    key_stride_h,
    values,
    value_stride_t,
    value_stride_h,
    ring,
    ring_stride_b,
    ring_stride_h,
    ring_stride_t,
    ring_table,
    ring_table_stride,
    queries,
    tail_keys,
    tail_values,
    num_queries,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    padded_head_dim: tl.constexpr,
    padded_value_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    ring_blocks: tl.constexpr,
    tokens: tl.constexpr,
    loads: tl.constexpr,
    stores: tl.constexpr,
):
    """Grid ``(rows, KV heads, parts)``: first parts of slots, then parts of the head's queries."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    owner = row * tl.num_programs(1) + head
    tail = tl.load(tail_lengths + row)
    old = tl.load(old_lengths + row)
    first_token = tl.load(first_tokens + row)
    slot_parts: tl.constexpr = _PAGE // tokens
    if part < slot_parts:
        if part * tokens < tail:
            _open_slots(
                part * tokens + tl.arange(0, tokens),
                tail,
                old,
                first_token,
                tl.load(page_counts + row) * _PAGE,
                tl.load(lengths + row),
                keys + head * key_stride_h,
                key_stride_t,
                values + head * value_stride_h,
                value_stride_t,
                ring + head * ring_stride_h,
                ring_stride_b,
                ring_stride_t,
                ring_table + tl.load(requests + row).to(tl.int64) * ring_table_stride,
                tail_keys + owner * _PAGE * head_dim,
                tail_values + owner * _PAGE * value_dim,
                head_dim,
                value_dim,
                padded_head_dim,
                padded_value_dim,
                block_tokens,
                ring_blocks,
                loads,
                stores,
            )
    else:
        number = (part - slot_parts) * tokens + tl.arange(0, tokens)
        slot = tail - num_queries + number % num_queries
        there = (number < group * num_queries)[:, None]
        channel = tl.arange(0, padded_head_dim)[None, :]
        token = (first_token + slot).to(tl.int64) * query_stride_t
        source = query + token + (head * group + number // num_queries) * query_stride_h
        states = tl.load(
            source[:, None] + channel,
            mask=there & (slot >= old)[:, None] & (channel < head_dim),
            other=0.0,
        )
        target = queries + (owner * group * num_queries + number) * head_dim
        tl.store(target[:, None] + channel, states, mask=there & (channel < head_dim))


@triton.jit
def _open_slots(
    slot,
    tail,
    old,
    first_token,
    start,
    length,
    keys,
    key_stride_t,
    values,
    value_stride_t,
    ring,
    ring_stride_b,
    ring_stride_t,
    ring_table,
    tail_keys,
    tail_values,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    padded_head_dim: tl.constexpr,
    padded_value_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    ring_blocks: tl.constexpr,
    loads: tl.constexpr,
    stores: tl.constexpr,
):
    """Some slots of a row's block, which begins at position ``start``; pointers are to one head."""
    channel = tl.arange(0, padded_head_dim)[None, :]
    value_channel = tl.arange(0, padded_value_dim)[None, :]
    is_channel = channel < head_dim
    is_value_channel = value_channel < value_dim
    position = start + slot
    column = position // block_tokens % ring_blocks
    place = tl.load(ring_table + column, mask=slot < tail, other=0).to(tl.int64)
    exact = ring + (place * ring_stride_b + position % block_tokens * ring_stride_t)[:, None]
    token = (first_token + slot).to(tl.int64)[:, None]
    is_old = (slot < old)[:, None]
    is_new = ((slot >= old) & (slot < tail))[:, None]
    key = tl.load(keys + token * key_stride_t + channel, mask=is_new & is_channel, other=0.0)
    value = tl.load(
        values + token * value_stride_t + value_channel, mask=is_new & is_value_channel, other=0.0
    )
    if stores:
        is_kept = is_new & (position >= length - ring_blocks * block_tokens)[:, None]
        tl.store(exact + channel, key, mask=is_kept & is_channel)
        tl.store(exact + head_dim + value_channel, value, mask=is_kept & is_value_channel)
    if loads:
        old_key = tl.load(exact + channel, mask=is_old & is_channel, other=0.0)
        old_value = tl.load(
            exact + head_dim + value_channel, mask=is_old & is_value_channel, other=0.0
        )
        is_used = (slot < tail)[:, None]
        tl.store(
            tail_keys + slot[:, None] * head_dim + channel,
            tl.where(is_old, old_key, key),
            mask=is_used & is_channel,
        )
        tl.store(
            tail_values + slot[:, None] * value_dim + value_channel,
            tl.where(is_old, old_value, value),
            mask=is_used & is_value_channel,
        )


@triton.jit(do_not_specialize=["num_queries"])
def _close_kernel(
    tail_lengths,
    old_lengths,
    first_tokens,
    result,
    output,
    output_stride_t,
    output_stride_h,
    num_queries,
    num_heads: tl.constexpr,
    value_dim: tl.constexpr,
    padded_value_dim: tl.constexpr,
    tokens: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * tokens + tl.arange(0, tokens)
    tail = tl.load(tail_lengths + row)
    slot = tail - num_queries + number % num_queries
    is_new = (slot >= tl.load(old_lengths + row)) & (number < num_heads * num_queries)
    token = (tl.load(first_tokens + row) + slot).to(tl.int64)[:, None]
    channel = tl.arange(0, padded_value_dim)[None, :]
    mask = is_new[:, None] & (channel < value_dim)
    source = (row * num_heads * num_queries + number)[:, None] * value_dim + channel
    target = token * output_stride_t + (number // num_queries)[:, None] * output_stride_h + channel
    tl.store(output + target, tl.load(result + source, mask=mask), mask=mask)
