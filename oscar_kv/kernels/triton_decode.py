"""Decode attention in Triton: the kernel that takes one part of a sequence.

A sequence is split over many programs; :mod:`~oscar_kv.kernels.triton_combine` merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.kernels.triton_attend import BLIND, LOG2_E, attend_dense, attend_pages
from oscar_kv.kernels.triton_page import PAGE, TOKENS
from oscar_kv.kernels.triton_rotation import rotated_query, stack


@triton.jit(
    do_not_specialize=["table_stride", "page_splits", "batch", "scaling", "softcap", "window"],
)
def decode_part(
    query,
    rotated,
    rotated_factor,
    pool,
    table,
    page_counts,
    tail_lengths,
    sink_lengths,
    tail_keys,
    tail_values,
    sink_keys,
    sink_values,
    new_keys,
    new_values,
    starts,
    mask,
    sums,
    maxima,
    mask_strides,
    table_stride,
    batch,
    page_splits,
    scaling,
    softcap,
    window,
    page: tl.constexpr,
    group: tl.constexpr,
    num_queries: tl.constexpr,
    columns: tl.constexpr,
    tail_slots: tl.constexpr,
    tail_blocks: tl.constexpr,
    sink_slots: tl.constexpr,
    tokens: tl.constexpr,
    dense_blocks: tl.constexpr,
    page_mask: tl.constexpr,
    mask_kind: tl.constexpr,
    has_new: tl.constexpr,
    has_starts: tl.constexpr,
    has_window: tl.constexpr,
    has_softcap: tl.constexpr,
    stages: tl.constexpr,
    launch_dependents: tl.constexpr,
):
    """One part of one sequence, for one KV head and ``columns`` of its query rows.

    One warp per program. The first ``page_splits`` parts of every (sequence, KV head, block of
    columns) share its pages; then come ``dense_blocks`` blocks of ``tokens`` tokens: of the tail
    (``tail_blocks``), the sinks, the new tokens. Programs of pages come first, since they take
    longer. Row ``g * num_queries + i`` of a KV head is query ``i`` of its head ``g``. Tensors are
    contiguous, but for the mask, whose strides are a tuple (sequence, head, query).

    Args:
        query: ``[B, Hq, Tq, D]``.
        rotated, rotated_factor: where the kernel does not rotate, the rotated queries in float16
            and ``[B, Hq, Tq]`` factors of theirs.
        sums: float32 ``[B, H, rows, parts, E]``, in the rotated basis for parts of pages.
        maxima: float32 ``[B, H, rows, parts, 2]``: maximum of the logits in base 2, normalizer.
        page_mask: 0 where every query sees every page whole, 1 where all queries see the same of
            them, 2 otherwise.
    """
    rows: tl.constexpr = group * num_queries
    column_blocks: tl.constexpr = (rows + columns - 1) // columns
    per_sequence: tl.constexpr = page.num_kv_heads * column_blocks
    if launch_dependents:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    page_programs = page_splits * per_sequence * batch
    if program < page_programs:
        part = program % page_splits
        program = program // page_splits
    else:
        program -= page_programs
        part = page_splits + program % dense_blocks
        program = program // dense_blocks
    parts = page_splits + dense_blocks
    head = program % page.num_kv_heads
    block = program // page.num_kv_heads % column_blocks
    sequence = program // per_sequence

    pages = tl.load(page_counts + sequence)
    sinks = tl.load(sink_lengths + sequence)
    tail = tl.load(tail_lengths + sequence)
    packed_end = sinks + pages * PAGE
    length = packed_end + tail
    limit = length
    if has_new:
        limit = length - num_queries
    start = 0
    if has_starts:
        start = tl.load(starts + sequence)

    blocks: tl.constexpr = page.value_blocks
    parts_of_query: tl.constexpr = page.segments
    row = block * columns + tl.arange(0, columns)
    clipped = tl.minimum(row, rows - 1)
    index = clipped % num_queries
    query_head = head * group + clipped // num_queries
    own = (length - num_queries + index)[None, :]
    query_index = (sequence * page.num_kv_heads * group + query_head) * num_queries + index
    query_row = (query_index.to(tl.int64) * page.head_dim)[None, :]
    mask_row = sequence.to(tl.int64) * mask_strides[0] + query_head.to(tl.int64) * mask_strides[1]
    mask_row = (mask + mask_row + index.to(tl.int64) * mask_strides[2])[None, :]
    valid = row < rows
    out = ((sequence * page.num_kv_heads + head) * rows + row).to(tl.int64) * parts + part
    out_row = (sums + out * page.value_dim)[None, :]

    if part < page_splits:
        # The query first: it does not wait for the lengths.
        segments = ()
        if page.rotates_in_kernel:
            rotated_blocks, factor = rotated_query(query + query_row, page.head_dim // TOKENS)
            for j in tl.static_range(parts_of_query):
                segments = segments + (
                    stack(
                        rotated_blocks,
                        page.segment_begin(j) // TOKENS,
                        page.segment_width(j) // TOKENS,
                    ),
                )
        else:
            for j in tl.static_range(parts_of_query):
                channel = tl.arange(0, page.segment_width(j)) + page.segment_begin(j)
                segments = segments + (tl.load(rotated + query_row + channel[:, None]),)
            factor = tl.load(rotated_factor + query_index)
        lowest = start
        if has_window:
            lowest = tl.maximum(lowest, length - num_queries - window + 1)
        first = tl.maximum(lowest - sinks, 0) // PAGE
        last = tl.minimum(pages, tl.cdiv(tl.maximum(limit - sinks, 0), PAGE))
        span = tl.cdiv(tl.maximum(last - first, 0), page_splits)
        begin = first + part * span
        end = tl.minimum(begin + span, last)
        if begin < end:
            seen_from = own
            seen_mask = mask_row
            if page_mask == 1:
                seen_from = tl.full([1, 1], 0, tl.int32) + (length - num_queries)
                seen_mask = mask + tl.full([1, 1], 0, tl.int64) + sequence * mask_strides[0]
            output, maximum, normalizer = attend_pages(
                pool,
                table + sequence.to(tl.int64) * table_stride,
                begin,
                end,
                head,
                segments,
                factor * (scaling * LOG2_E),
                sinks,
                seen_from,
                start,
                limit,
                window,
                seen_mask,
                softcap,
                page,
                page_mask,
                mask_kind,
                has_window,
                has_softcap,
                stages,
            )
            for b in tl.static_range(blocks):
                channel = (tl.arange(0, TOKENS) + b * TOKENS)[:, None]
                there = valid[None, :] & (channel < page.value_dim)
                tl.store(out_row + channel, output[b], mask=there)
            tl.store(maxima + out * 2, maximum, mask=valid)
            tl.store(maxima + out * 2 + 1, normalizer, mask=valid)
        else:
            tl.store(maxima + out * 2, BLIND, mask=valid)
            tl.store(maxima + out * 2 + 1, 0.0, mask=valid)
    else:
        number = part - page_splits
        owner = (sequence * page.num_kv_heads + head).to(tl.int64)
        keys = tail_keys + owner * (tail_slots * page.head_dim)
        values = tail_values + owner * (tail_slots * page.value_dim)
        count = tail
        position = packed_end
        if number >= tail_blocks:
            number -= tail_blocks
            if has_new and number >= tl.cdiv(sink_slots, tokens):
                number -= tl.cdiv(sink_slots, tokens)
                keys = new_keys + owner * (num_queries * page.head_dim)
                values = new_values + owner * (num_queries * page.value_dim)
                count = num_queries
                position = limit
                limit = length
            else:
                keys = sink_keys + owner * (sink_slots * page.head_dim)
                values = sink_values + owner * (sink_slots * page.value_dim)
                count = sinks
                position = 0
        first_token = number * tokens
        if first_token < count:
            channel = tl.arange(0, page.padded_head_dim)[:, None]
            loaded = tl.load(
                query + query_row + channel,
                mask=valid[None, :] & (channel < page.head_dim),
                other=0.0,
            )
            output, maximum, normalizer = attend_dense(
                keys + first_token * page.head_dim,
                values + first_token * page.value_dim,
                tl.minimum(count - first_token, tokens),
                loaded.to(tail_keys.dtype.element_ty),
                scaling,
                position + first_token,
                own,
                start,
                limit,
                window,
                mask_row,
                softcap,
                page,
                tokens,
                mask_kind,
                has_window,
                has_softcap,
            )
            channel = tl.arange(0, page.padded_value_dim)[:, None]
            tl.store(out_row + channel, output, mask=valid[None, :] & (channel < page.value_dim))
            tl.store(maxima + out * 2, maximum, mask=valid)
            tl.store(maxima + out * 2 + 1, normalizer, mask=valid)
        else:
            tl.store(maxima + out * 2, BLIND, mask=valid)
            tl.store(maxima + out * 2 + 1, 0.0, mask=valid)
