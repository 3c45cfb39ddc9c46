"""Decode attention in Triton: a few new queries per sequence, straight from packed pages.

A sequence is split over many programs of one warp each: some take runs of packed pages, others
blocks of full-precision tokens. :mod:`~oscar_kv.kernels.triton_combine` merges what they find.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oscar_kv.core.rotation import rotation_factors
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.device import capability, multiprocessors, shared_memory
from oscar_kv.kernels.masking import Visibility
from oscar_kv.kernels.triton_attend import BLIND, LOG2_E, attend_dense, attend_pages
from oscar_kv.kernels.triton_combine import combine_parts
from oscar_kv.kernels.triton_page import PAGE, TOKENS, PageSpec, page_spec
from oscar_kv.kernels.triton_query import query_segments
from oscar_kv.kernels.triton_rotate import rotate_queries
from oscar_kv.storage.paged import Sequences

# Of the programs that fit an SM, so many share the pages; the rest is for dense tokens.
_SHARE_FOR_PAGES = 0.8
_MOST_PER_SM = 12  # by registers
# Pages per program: more make the last ones late; one alone does not pay where there are many.
_MOST_PAGES = 16
_MANY_PAGES = 96


def decode(call: AttentionCall) -> Tensor:
    """:func:`oscar_kv.kernels.reference.attend` for a few query rows."""
    query, packed, new_keys, new_values = call.query, call.packed, call.new_keys, call.new_values
    scaling, softcap, s_aux, visibility = call.scaling, call.softcap, call.s_aux, call.visibility
    layout, device = packed.layout, packed.device
    page = page_spec(layout, capability(device) >= (8, 9))
    if scaling < 0:
        query, scaling = -query, -scaling
    query = query.contiguous()
    batch, num_heads, num_queries, _ = query.shape
    group = num_heads // layout.num_kv_heads
    rows = group * num_queries
    columns = 8 if rows <= 8 else 16
    column_blocks = -(-rows // columns)
    tokens = 32 if max(page.padded_head_dim, page.padded_value_dim) <= 128 else 16
    # Launched before what they wait for has finished, they start sooner.
    early = capability(device) >= (9, 0)
    launch = {"launch_pdl": True} if early else {}
    page_splits = _page_splits(packed, page, columns, column_blocks)
    tail_blocks = -(-packed.most_tail_tokens // tokens)
    has_new = new_keys is not None
    sink_blocks = -(-packed.sink_keys.shape[2] // tokens)
    dense_blocks = tail_blocks + sink_blocks + (-(-num_queries // tokens) if has_new else 0)
    parts = page_splits + dense_blocks
    sums = torch.empty(
        (batch, num_heads, num_queries, parts, page.value_dim), dtype=torch.float32, device=device
    )
    maxima = torch.empty((*sums.shape[:4], 2), dtype=torch.float32, device=device)
    rotated, factor = (query, query) if page.rotates_in_kernel else rotate_queries(query)
    mask, mask_kind, mask_strides = _mask_arguments(visibility.mask, query)
    window = visibility.sliding_window
    decode_part[(parts * layout.num_kv_heads * column_blocks * batch,)](
        query,
        rotated,
        factor,
        packed.page_data,
        packed.block_table,
        packed.page_counts,
        packed.tail_lengths,
        packed.sink_lengths,
        packed.tail_keys,
        packed.tail_values,
        packed.sink_keys,
        packed.sink_values,
        new_keys.contiguous() if new_keys is not None else query,
        new_values.contiguous() if new_values is not None else query,
        visibility.starts if visibility.starts is not None else query,
        mask,
        sums,
        maxima,
        mask_strides,
        packed.block_table.stride(0),
        batch,
        num_queries,
        page_splits,
        dense_blocks,
        tail_blocks,
        scaling,
        softcap or 0.0,
        window or 0,
        page=page,
        group=group,
        columns=columns,
        tail_slots=packed.tail_keys.shape[2],
        sink_slots=packed.sink_keys.shape[2],
        tokens=tokens,
        page_mask=_page_mask(packed, visibility, has_new),
        mask_kind=mask_kind,
        has_new=has_new,
        has_starts=visibility.starts is not None,
        has_window=window is not None,
        has_softcap=softcap is not None,
        stages=3,
        early=early,
        num_warps=1,
        maxnreg=168 if columns == 8 else 255,
        **launch,
    )
    out = call.new_result()
    outer, inner = rotation_factors(page.value_dim, device)
    # Powers of four from 16 on: an engine has to compile few kernels for all its lengths.
    parts_padded = 4 ** max(2, -(-(parts - 1).bit_length() // 2))
    chunk = min(parts_padded, 64)
    combine_parts[(batch * num_heads * num_queries,)](
        sums,
        maxima,
        s_aux if s_aux is not None else query,
        outer,
        inner,
        out,
        parts,
        page_splits,
        num_queries,
        page=page,
        group=group,
        outer_size=outer.shape[0],
        outer_padded=1 << (outer.shape[0] - 1).bit_length(),
        inner_size=inner.shape[0],
        parts_padded=parts_padded,
        chunk=chunk,
        has_sink_logits=s_aux is not None,
        early=early,
        num_warps=4,
        **launch,
    )
    return out


def _page_splits(packed: Sequences, page: PageSpec, columns: int, column_blocks: int) -> int:
    """Programs that share the pages of one sequence, KV head and block of columns."""
    pages = packed.most_pages
    if not pages:
        return 0
    others = packed.batch_size * packed.layout.num_kv_heads * column_blocks
    # Two pages on their way, and the query folded with every key group.
    shared = 2 * page.page_bytes + 2 * columns * page.head_dim * page.key_groups + 2048
    fitting = min(_MOST_PER_SM, shared_memory(packed.device) // shared)
    programs = max(1, int(_SHARE_FOR_PAGES * fitting)) * multiprocessors(packed.device)
    at_once = max(1, programs // others)
    fewest = 1 if pages < _MANY_PAGES else 2
    each = min(max(-(-pages // at_once), fewest), _MOST_PAGES)
    return -(-pages // each)


def _page_mask(packed: Sequences, visibility: Visibility, has_new: bool) -> int:
    """How page visibility varies; see :func:`~oscar_kv.kernels.triton_decode.decode_part`."""
    one_query = visibility.num_queries == 1
    mask = visibility.mask
    # Tokens of pages come before the first query, wherever the tail holds the other queries.
    all_before = has_new or one_query or visibility.num_queries - 1 <= packed.fewest_tail_tokens
    if mask is not None and not (one_query and mask.shape[1] == 1):
        return 2
    if not one_query and (visibility.sliding_window is not None or not all_before):
        return 2
    plain = mask is None and visibility.starts is None and visibility.sliding_window is None
    return 0 if plain and not has_new else 1


def _mask_arguments(mask: Tensor | None, query: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    if mask is None:
        return query, 0, (0, 0, 0)
    if mask.stride(3) != 1:
        mask = mask.contiguous()
    strides = [0 if mask.shape[i] == 1 else mask.stride(i) for i in range(3)]
    kind = 1 if mask.dtype == torch.bool else 2
    return mask.view(torch.uint8) if kind == 1 else mask, kind, (strides[0], strides[1], strides[2])


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "batch",
        "page_splits",
        "dense_blocks",
        "tail_blocks",
        "scaling",
        "softcap",
        "window",
    ],
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
    num_queries,
    page_splits,
    dense_blocks,
    tail_blocks,
    scaling,
    softcap,
    window,
    page: tl.constexpr,
    group: tl.constexpr,
    columns: tl.constexpr,
    tail_slots: tl.constexpr,
    sink_slots: tl.constexpr,
    tokens: tl.constexpr,
    page_mask: tl.constexpr,
    mask_kind: tl.constexpr,
    has_new: tl.constexpr,
    has_starts: tl.constexpr,
    has_window: tl.constexpr,
    has_softcap: tl.constexpr,
    stages: tl.constexpr,
    early: tl.constexpr,
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
    rows = group * num_queries
    column_blocks = (rows + columns - 1) // columns
    per_sequence = page.num_kv_heads * column_blocks
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
    row = block * columns + tl.arange(0, columns)
    clipped = tl.minimum(row, rows - 1)
    index = clipped % num_queries
    query_head = head * group + clipped // num_queries
    own = (length - num_queries + index)[None, :]
    query_index = (sequence * page.num_kv_heads * group + query_head) * num_queries + index
    mask_row = sequence.to(tl.int64) * mask_strides[0] + query_head.to(tl.int64) * mask_strides[1]
    mask_row = (mask + mask_row + index.to(tl.int64) * mask_strides[2])[None, :]
    valid = row < rows
    out = ((sequence * page.num_kv_heads + head) * rows + row).to(tl.int64) * parts + part
    out_row = (sums + out * page.value_dim)[None, :]

    if part < page_splits:
        # The query first: it does not wait for the lengths.
        segments, factor = query_segments(query, rotated, rotated_factor, query_index, page)
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
            query_channel = tl.arange(0, page.padded_head_dim)[:, None]
            own_query = query + (query_index.to(tl.int64) * page.head_dim)[None, :] + query_channel
            loaded = tl.load(own_query, mask=query_channel < page.head_dim, other=0.0)
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
            value_channel = tl.arange(0, page.padded_value_dim)[:, None]
            there = valid[None, :] & (value_channel < page.value_dim)
            tl.store(out_row + value_channel, output, mask=there)
            tl.store(maxima + out * 2, maximum, mask=valid)
            tl.store(maxima + out * 2 + 1, normalizer, mask=valid)
        else:
            tl.store(maxima + out * 2, BLIND, mask=valid)
            tl.store(maxima + out * 2 + 1, 0.0, mask=valid)
