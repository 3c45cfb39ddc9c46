"""Attention of a block of query rows over one sequence, and merging the parts of such blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.kernels.triton_attend import LOG2_E
from oscar_kv.kernels.triton_extend_attend import LOWEST, add_dense, add_pages
from oscar_kv.kernels.triton_page import PAGE
from oscar_kv.kernels.triton_rotate import rotate_rows
from oscar_kv.kernels.triton_tile import tile_unit


@triton.jit(do_not_specialize=["parts", "table_width", "sink_slots", "tail_slots", "num_queries"])
def extend_kernel(
    output,
    sums,
    statistics,
    parts,
    query,
    query_strides,
    rotated,
    factors,
    signs,
    pool,
    block_table,
    table_width,
    page_counts,
    sink_lengths,
    tail_lengths,
    sink_keys,
    sink_values,
    sink_slots,
    tail_keys,
    tail_values,
    tail_slots,
    new_keys,
    new_values,
    starts,
    s_aux,
    mask,
    mask_strides,
    num_queries,
    scaling,
    rotation_unit,
    spec: tl.constexpr,
):
    page: tl.constexpr = spec.page
    # The newest queries see the most: they start first. The last part of a block also takes the
    # tokens in full precision.
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // parts
    part = tl.program_id(0) % parts
    is_last = part == parts - 1
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    sinks = tl.load(sink_lengths + sequence)
    pages = tl.load(page_counts + sequence)
    pages_end = sinks + pages * PAGE
    length = pages_end + tl.load(tail_lengths + sequence)
    limit = length  # what the cache is read up to
    if new_keys is not None:
        limit -= num_queries

    # Rows are queries times heads, heads fastest: a block spans few positions. Those past the
    # last repeat it and are not stored.
    row = block * spec.block_rows + tl.arange(0, spec.block_rows)
    exists = row < num_queries * spec.group
    row = tl.minimum(row, num_queries * spec.group - 1)
    index, member = row // spec.group, row % spec.group
    own = length - num_queries + index
    first_own = tl.min(own, 0)
    last_own = tl.max(own, 0)
    query_head = head * spec.group + member
    num_heads = page.num_kv_heads * spec.group
    source = (sequence.to(tl.int64) * num_heads + query_head) * num_queries + index

    # Positions that some row sees, and that all rows see.
    low, high, all_low, all_high = 0, length, 0, length
    start = 0
    mask_rows = 0
    if mask is None:
        if starts is not None:
            start = tl.maximum(tl.load(starts + sequence).to(tl.int32), 0)
        low, all_low = start, start
        high, all_high = last_own + 1, first_own + 1
    else:
        all_high = 0
        mask_rows = (
            sequence.to(tl.int64) * mask_strides[0]
            + query_head.to(tl.int64) * mask_strides[1]
            + index.to(tl.int64) * mask_strides[2]
        )
        mask_strides = mask_strides[3]
    if spec.window is not None:
        low = tl.maximum(low, first_own - spec.window + 1)
        all_low = tl.maximum(all_low, last_own - spec.window + 1)
    view = (own, start, mask, mask_rows, mask_strides)

    maximum = tl.full([spec.block_rows], LOWEST, tl.float32)
    normalizer = tl.full([spec.block_rows], 0.0, tl.float32)
    if s_aux is not None:
        aux = tl.load(s_aux + query_head).to(tl.float32) * LOG2_E
        maximum = tl.where(is_last, tl.maximum(aux, LOWEST), LOWEST)
        normalizer += tl.where(is_last, 1.0, 0.0)
    total = tl.full([spec.block_rows, page.padded_value_dim], 0.0, tl.float32)

    # Packed pages: those that all rows see wholly need no comparisons.
    channel = tl.arange(0, page.padded_head_dim)
    rows = tl.load(
        rotated + source[:, None] * page.head_dim + channel[None, :],
        channel[None, :] < page.head_dim,
        0.0,
    )
    row_factor = tl.load(factors + source)
    logit_unit = scaling * LOG2_E
    readable = tl.minimum(pages_end, limit)
    first = tl.maximum(low - sinks, 0) // PAGE
    last = tl.maximum(tl.cdiv(tl.minimum(high, readable) - sinks, PAGE), first)
    all_first = tl.minimum(tl.maximum(tl.cdiv(all_low - sinks, PAGE), first), last)
    all_last = (tl.minimum(all_high, readable) - sinks) // PAGE
    all_last = tl.minimum(tl.maximum(all_last, all_first), last)
    inner = all_last - all_first
    outer = last - first - inner
    inner_share, outer_share = tl.cdiv(inner, parts), tl.cdiv(outer, parts)
    inner_begin, outer_begin = part * inner_share, part * outer_share
    table = block_table + sequence.to(tl.int64) * table_width
    state = (total, maximum, normalizer, tl.full([], 0, tl.int32))
    state = add_pages(
        state, rows, row_factor, logit_unit, pool, table, head, all_first + inner_begin,
        tl.minimum(inner_share, inner - inner_begin), last, 0, sinks, readable, view, spec, False,
    )  # fmt: skip
    state = add_pages(
        state, rows, row_factor, logit_unit, pool, table, head, first + outer_begin,
        tl.minimum(outer_share, outer - outer_begin), all_first, inner, sinks, readable, view,
        spec, True,
    )  # fmt: skip
    total, maximum, normalizer, exponent = state

    total = rotate_rows(total, signs, page.value_dim, True)
    total *= rotation_unit * tile_unit(page)
    total *= tl.exp2(exponent.to(tl.float32))

    # Full-precision tokens, in the original basis.
    high = tl.where(is_last, high, 0)
    rows = (
        sequence.to(tl.int64) * query_strides[0]
        + query_head.to(tl.int64) * query_strides[1]
        + index.to(tl.int64) * query_strides[2]
    )
    rows = tl.load(
        query + rows[:, None] + channel[None, :] * query_strides[3],
        channel[None, :] < page.head_dim,
        0.0,
    )
    cache = sequence.to(tl.int64) * page.num_kv_heads + head
    state = (total, maximum, normalizer)
    if sink_keys is not None:
        state = add_dense(
            state, rows, logit_unit, sink_keys, sink_values, cache * sink_slots,
            0, tl.minimum(sinks, limit), low, high, view, spec,
        )  # fmt: skip
    state = add_dense(
        state, rows, logit_unit, tail_keys, tail_values, cache * tail_slots,
        pages_end, limit, low, high, view, spec,
    )  # fmt: skip
    if new_keys is not None:
        state = add_dense(
            state, rows, logit_unit, new_keys, new_values, cache * num_queries,
            limit, length, low, high, view, spec,
        )  # fmt: skip
    total, maximum, normalizer = state

    column = tl.arange(0, page.padded_value_dim)[None, :]
    stored = exists[:, None] & (column < page.value_dim)
    if sums is None:
        total /= tl.where(normalizer == 0, 1.0, normalizer)[:, None]
        target = source[:, None] * page.value_dim + column
        tl.store(output + target, total.to(output.dtype.element_ty), stored)
    else:
        source += part * (tl.num_programs(2).to(tl.int64) * num_heads * num_queries)
        tl.store(sums + source[:, None] * page.value_dim + column, total, stored)
        tl.store(statistics + source * 2, maximum, exists)
        tl.store(statistics + source * 2 + 1, normalizer, exists)


@triton.jit(do_not_specialize=["num_rows", "parts"])
def combine_rows(
    output,
    sums,
    statistics,
    num_rows,
    parts,
    value_dim: tl.constexpr,
    value_channels: tl.constexpr,
    block_rows: tl.constexpr,
):
    """Merges the parts of rows: sums ``[parts, rows, E]``, maxima and normalizers ``[.., 2]``."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows).to(tl.int64)
    exists = row < num_rows
    column = tl.arange(0, value_channels)[None, :]
    inside = exists[:, None] & (column < value_dim)
    target = row[:, None] * value_dim + column
    maximum = tl.full([block_rows], LOWEST, tl.float32)
    normalizer = tl.full([block_rows], 0.0, tl.float32)
    total = tl.full([block_rows, value_channels], 0.0, tl.float32)
    for _ in range(parts):
        part_maximum = tl.load(statistics + row * 2, exists, LOWEST)
        part_normalizer = tl.load(statistics + row * 2 + 1, exists, 0.0)
        part_total = tl.load(sums + target, inside, 0.0)
        grown = tl.maximum(maximum, part_maximum)
        old, new = tl.exp2(maximum - grown), tl.exp2(part_maximum - grown)
        normalizer = normalizer * old + part_normalizer * new
        total = total * old[:, None] + part_total * new[:, None]
        maximum = grown
        sums += num_rows * value_dim
        statistics += num_rows * 2
    total /= tl.where(normalizer == 0, 1.0, normalizer)[:, None]
    tl.store(output + target, total.to(output.dtype.element_ty), inside)
