# A kernel's constants are plain values that pyright takes for `tl.constexpr` objects, and Triton
# knows no starred tuples.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# ruff: noqa: RUF005
"""Attention of many new queries over packed pages: chunked prefill, multi-turn, verification.

A program holds a block of query rows of one KV head (the group's query heads side by side), walks
over the sequence's pages and dequantizes each into two float16 tiles, once for all its rows. The
dequantized prefix never leaves the multiprocessor. Pages live in the rotated basis: their rotated
sum is turned back by one product with the signs of the rotation, and the softmax then goes on over
the full-precision tokens (sinks, tail, fresh states) in the original basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from oscar_kv.kernels.masking import Visibility
from oscar_kv.kernels.triton_page import (
    _ASSEMBLY,
    NUM_PLANES,
    PAGE,
    TOKENS,
    PageSpec,
    decode_metadata,
    metadata_pointer,
    page_pointer,
    page_spec,
    slot,
)
from oscar_kv.kernels.triton_rotate import rotate_queries, rotate_rows, rotation_signs
from oscar_kv.storage.packed import PackedKV

_PROGRAMS_PER_SM = 2
# Pages that are worth a program of their own.
_FEWEST_PAGES = 4
_COMBINED_ROWS = 4

_LOG2E = tl.constexpr(1.4426950408889634)
# Finite, so that a row that has seen nothing yet has differences; below any logit.
_LOWEST = tl.constexpr(-3.0e38)


@dataclass(frozen=True)
class ExtendSpec:
    """What is compiled into the kernel; one ``tl.constexpr`` argument."""

    page: PageSpec
    group: int
    """Query heads of one KV head."""
    window: int | None
    softcap: float | None
    block_rows: int
    block_tokens: int
    """Full-precision tokens at a time."""
    wide: bool
    """Full-precision products in float32, not in the dtype of the states."""

    @property
    def key_channels(self) -> int:
        return triton.next_power_of_2(self.page.head_dim)

    @property
    def value_channels(self) -> int:
        return triton.next_power_of_2(self.page.value_dim)

    @property
    def grid_rows(self) -> int:
        """Rows of a page's value grids: groups, or channels where only these are a power of two."""
        groups, channels = self.page.value_groups, self.value_channels
        return groups if groups == 1 or groups * self.page.value_group == channels else channels

    @property
    def tile_exponent(self) -> int:
        """A tile holds dequantized numbers times ``2**-tile_exponent``."""
        return 13 if self.page.fp8 else 2


def extend(
    query: Tensor,
    packed: PackedKV,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
    visibility: Visibility,
) -> Tensor:
    """Attention of the newest ``Tq`` tokens over everything in ``packed``.

    Products with packed pages are float16 with float32 sums; those with full-precision tokens are
    in their dtype, float32 where the query's is another.

    Args: as :func:`oscar_kv.kernels.reference.attend`.

    Returns:
        ``[B, Hq, Tq, E]`` in the dtype of ``query``.
    """
    layout, device = packed.layout, query.device
    batch, num_heads, num_queries, _ = query.shape
    group = num_heads // layout.num_kv_heads
    wide = query.dtype != packed.dtype or query.dtype == torch.float32
    large = max(layout.head_dim, layout.value_dim) > 128
    spec = ExtendSpec(
        page=page_spec(layout),
        group=group,
        window=visibility.sliding_window,
        softcap=softcap,
        block_rows=32 if wide else 64,
        block_tokens=32 if wide or large else 64,
        wide=wide,
    )
    rotated, factors = rotate_queries(query)
    signs, unit = rotation_signs(layout.value_dim, device)
    mask = visibility.mask
    if mask is not None:
        mask = mask.expand(batch, num_heads, num_queries, -1)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if new_keys is not None and new_values is not None:
        new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
    output = query.new_empty((batch, num_heads, num_queries, layout.value_dim))
    blocks = triton.cdiv(group * num_queries, spec.block_rows)
    parts = _parts(blocks * layout.num_kv_heads * batch, packed.block_table.shape[1], device)
    sums = statistics = None
    if parts > 1:
        sums = torch.empty((parts, *output.shape), dtype=torch.float32, device=device)
        statistics = torch.empty((*sums.shape[:-1], 2), dtype=torch.float32, device=device)
    _extend_kernel[(blocks * parts, layout.num_kv_heads, batch)](
        output,
        sums,
        statistics,
        parts,
        query,
        query.stride(),
        rotated,
        factors,
        signs,
        packed.pool.data,
        packed.block_table,
        packed.block_table.shape[1],
        packed.page_counts,
        packed.sink_lengths,
        packed.tail_lengths,
        packed.sink_keys if packed.sink_keys.shape[2] else None,
        packed.sink_values,
        packed.sink_keys.shape[2],
        packed.tail_keys,
        packed.tail_values,
        packed.tail_keys.shape[2],
        new_keys,
        new_values,
        visibility.starts,
        s_aux,
        mask,
        (0, 0, 0, 0) if mask is None else mask.stride(),
        num_queries,
        scaling,
        unit,
        spec,
        num_warps=8 if large else 4,
        num_stages=1 if large else 2,
    )
    if parts > 1:
        rows = batch * num_heads * num_queries
        _combine_kernel[(triton.cdiv(rows, _COMBINED_ROWS),)](
            output,
            sums,
            statistics,
            rows,
            parts,
            layout.value_dim,
            spec.value_channels,
            _COMBINED_ROWS,
        )
    return output


def _parts(programs: int, pages: int, device: torch.device) -> int:
    """How many programs share the pages of one block of rows, where there are few blocks."""
    at_once = _PROGRAMS_PER_SM * _multiprocessors(device)
    return max(1, min(at_once // programs, pages // _FEWEST_PAGES))


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["parts", "table_width", "sink_slots", "tail_slots", "num_queries"])
def _extend_kernel(
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

    maximum = tl.full([spec.block_rows], _LOWEST, tl.float32)
    normalizer = tl.full([spec.block_rows], 0.0, tl.float32)
    if s_aux is not None:
        aux = tl.load(s_aux + query_head).to(tl.float32) * _LOG2E
        maximum = tl.where(is_last, tl.maximum(aux, _LOWEST), _LOWEST)
        normalizer += tl.where(is_last, 1.0, 0.0)
    total = tl.full([spec.block_rows, spec.value_channels], 0.0, tl.float32)

    # Packed pages: those that all rows see wholly need no comparisons.
    channel = tl.arange(0, spec.key_channels)
    rows = tl.load(
        rotated + source[:, None] * page.head_dim + channel[None, :],
        channel[None, :] < page.head_dim,
        0.0,
    )
    row_factor = tl.load(factors + source)
    logit_unit = scaling * _LOG2E
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
    state = _attend_pages(
        state, rows, row_factor, logit_unit, pool, table, head, all_first + inner_begin,
        tl.minimum(inner_share, inner - inner_begin), last, 0, sinks, readable, view, spec, False,
    )  # fmt: skip
    state = _attend_pages(
        state, rows, row_factor, logit_unit, pool, table, head, first + outer_begin,
        tl.minimum(outer_share, outer - outer_begin), all_first, inner, sinks, readable, view,
        spec, True,
    )  # fmt: skip
    total, maximum, normalizer, exponent = state

    total = rotate_rows(total, signs, page.value_dim, True)
    total *= rotation_unit * 2.0**spec.tile_exponent
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
        state = _attend_dense(
            state, rows, logit_unit, sink_keys, sink_values, cache * sink_slots,
            0, tl.minimum(sinks, limit), low, high, view, spec,
        )  # fmt: skip
    state = _attend_dense(
        state, rows, logit_unit, tail_keys, tail_values, cache * tail_slots,
        pages_end, limit, low, high, view, spec,
    )  # fmt: skip
    if new_keys is not None:
        state = _attend_dense(
            state, rows, logit_unit, new_keys, new_values, cache * num_queries,
            limit, length, low, high, view, spec,
        )  # fmt: skip
    total, maximum, normalizer = state

    column = tl.arange(0, spec.value_channels)[None, :]
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
def _combine_kernel(
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
    maximum = tl.full([block_rows], _LOWEST, tl.float32)
    normalizer = tl.full([block_rows], 0.0, tl.float32)
    total = tl.full([block_rows, value_channels], 0.0, tl.float32)
    for _ in range(parts):
        part_maximum = tl.load(statistics + row * 2, exists, _LOWEST)
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


@triton.jit
def _attend_pages(
    state,
    rows,
    row_factor,
    logit_unit,
    pool,
    table,
    head,
    first,
    count,
    skip_at,
    skip,
    sinks,
    end,
    view,
    spec: tl.constexpr,
    edges: tl.constexpr,
):
    """Adds ``count`` pages from ``first`` on to ``state``, passing over ``skip`` of them where
    ``skip_at`` is reached. Where ``edges``, some of their tokens may be hidden from some rows."""
    total, maximum, normalizer, exponent = state
    if count > 0:
        # Loads run one page ahead, and block table entries two.
        last = count - 1
        following = tl.load(table + _page_index(0, first, skip_at, skip))
        fetched = _fetch_page(pool, following, head, spec)
        following = tl.load(table + _page_index(tl.minimum(1, last), first, skip_at, skip))
        for j in range(count):
            current = fetched
            fetched = _fetch_page(pool, following, head, spec)
            following = tl.load(table + _page_index(tl.minimum(j + 2, last), first, skip_at, skip))
            values = _value_tile(current, spec)
            keys = _key_tile(current, spec)
            logits = tl.dot(rows, tl.trans(keys))
            unit = tl.sum(current[4].to(tl.float32)[:, None], 1)  # as in _pairs
            unit *= logit_unit * 2.0**spec.tile_exponent
            logits = logits * unit[None, :]
            factor = row_factor
            if edges or spec.softcap is not None:
                logits = _cap(logits * row_factor[:, None], spec)
                factor = tl.full([spec.block_rows], 1.0, tl.float32)
            if edges:
                position = sinks + _page_index(j, first, skip_at, skip) * PAGE
                position += tl.arange(0, PAGE)
                logits = _hide(logits, position, end, view, spec)
            grown = tl.maximum(maximum, tl.max(logits, 1) * factor)
            rescale = tl.exp2(maximum - grown)
            maximum = grown
            # The sums are in units of 2**exponent. A page has its own unit; the difference goes
            # into the weights as long as float16 can hold them, else the sums change theirs.
            own_exponent = current[5]
            kept = tl.minimum(tl.maximum(exponent, own_exponent - 12), own_exponent + 8)
            kept = tl.maximum(kept, exponent - 60)
            shift = (own_exponent - kept).to(tl.float32)
            if edges:  # near _LOWEST a shift of the maximum would be lost
                weights = tl.exp2(logits - maximum[:, None] + shift)
            else:
                weights = tl.exp2(logits * factor[:, None] - (maximum - shift)[:, None])
            normalizer = normalizer * rescale + tl.sum(weights, 1) * tl.exp2(-shift)
            total *= (rescale * tl.exp2((exponent - kept).to(tl.float32)))[:, None]
            exponent = kept
            total = tl.dot(weights.to(tl.float16), tl.trans(values), total)
    return total, maximum, normalizer, exponent


@triton.jit
def _page_index(j, first, skip_at, skip):
    index = first + j
    return index + tl.where(index >= skip_at, skip, 0)


@triton.jit
def _fetch_page(pool, page_id, head, spec: tl.constexpr):
    """Raw contents of a page, so that its loads can run ahead of their use.

    Words are int32, two neighbouring 16-bit words at a time: channels of keys, tokens of values.

    Returns:
        0, 1: key words ``[16, D / 2]``, low and high bits; 2, 3: value words ``[E, 8]``;
        4: float16 token scales ``[128]``; 5: int32 exponent of the value unit;
        6: key grids, for each group a pair (scales, centres) ``[D]``;
        7: value grids, see :func:`_value_grid`, or the page's first byte if there are many.
    """
    page: tl.constexpr = spec.page
    base = page_pointer(pool, page_id, head, page)
    half: tl.constexpr = spec.key_channels // 2
    pair = tl.arange(0, half)[None, :]
    words = (base + page.key_codes).to(tl.pointer_type(tl.int32))
    words += tl.arange(0, TOKENS)[:, None] * (page.head_dim // 2) + pair
    key_low = _load_some(words, pair, page.head_dim // 2)
    key_high = key_low
    if page.key_bits == 4:
        key_high = _load_some(words + page.head_dim * 8, pair, page.head_dim // 2)

    row = tl.arange(0, spec.value_channels)[:, None]
    words = (base + page.value_codes).to(tl.pointer_type(tl.int32))
    words += row * 8 + tl.arange(0, 8)[None, :]
    value_low = _load_some(words, row, page.value_blocks * 16)
    value_high = value_low
    if page.value_bits == 4:
        value_high = _load_some(words + page.value_blocks * 128, row, page.value_blocks * 16)

    channel = tl.arange(0, spec.key_channels)
    scales = metadata_pointer(base, page.key_scale, page) + channel
    centres = metadata_pointer(base, page.key_centre, page) + channel
    key_grids = ()
    groups: tl.constexpr = page.key_groups
    for group in tl.static_range(groups):
        scale = _load_some(scales + group * page.head_dim, channel, page.head_dim)
        centre = _load_some(centres + group * page.head_dim, channel, page.head_dim)
        key_grids = key_grids + ((scale, centre),)

    slots = slot(tl.arange(0, PAGE))
    if page.shared_scale:
        holder = page_pointer(pool, page_id, 0, page) + page.token_scale
        holder += slots // page.scales_per_page * page.page_bytes
        token_scale = tl.load(holder.to(tl.pointer_type(tl.float16)) + slots % page.scales_per_page)
    else:
        token_scale = tl.load((base + page.token_scale).to(tl.pointer_type(tl.float16)) + slots)
    value_grid = _value_grid(base, spec) if page.value_groups == 1 else base
    exponent = tl.full([], 0, tl.int32)
    if page.value_unit >= 0:
        bits = tl.load((base + page.value_unit).to(tl.pointer_type(tl.int32)))
        exponent = (bits >> 23) - 127
    words = (key_low, key_high, value_low, value_high)
    return words + (token_scale, exponent, key_grids, value_grid)


@triton.jit
def _load_some(pointer, index, size: tl.constexpr):
    """Loads where ``index < size``, which costs nothing where ``size`` is a power of two."""
    if index.numel == size:
        return tl.load(pointer)
    else:
        return tl.load(pointer, index < size, 0)


@triton.jit
def _key_tile(fetched, spec: tl.constexpr):
    """float16 ``[128 tokens, D]``: keys without their token scale, times 2**-tile_exponent."""
    planes = ()
    for p in tl.static_range(NUM_PLANES):
        planes = planes + (_key_plane(fetched, p, spec),)
    tile = _stack(planes).permute(4, 3, 2, 0, 1)  # [2, 2, 2, 16, D / 2]
    return _halves(tile.reshape(PAGE, spec.key_channels // 2))


@triton.jit
def _key_plane(fetched, p: tl.constexpr, spec: tl.constexpr):
    page: tl.constexpr = spec.page
    group: tl.constexpr = p * TOKENS // page.key_group
    scale, centre = fetched[6][group]
    scale, centre = decode_metadata(scale, page), decode_metadata(centre, page)
    scale, centre = _grid(scale, centre, page.key_middle, spec)
    scale, centre = _pairs(scale)[None, :], _pairs(centre)[None, :]
    if page.fp8 and _position(p) > 4:
        scale = _fma(scale, _both(4.0 ** (2 - _position(p) // 2)), 0)
    if page.key_bits == 4:
        centre = _fma(_plane(fetched[1], p, page.fp8), _fma(scale, _both(4.0), 0), centre)
    return _fma(_plane(fetched[0], p, page.fp8), scale, centre)


@triton.jit
def _value_tile(fetched, spec: tl.constexpr):
    """float16 ``[E, 128 tokens]``: values over their page's unit, times 2**-tile_exponent."""
    page: tl.constexpr = spec.page
    raw = fetched[7] if page.value_groups == 1 else _value_grid(fetched[7], spec)
    if page.fp8:  # as decode_metadata
        scale = ((raw & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
        centre = ((raw & -0x8000) | ((raw >> 1) & 0x3F80)).to(tl.float16, bitcast=True) * 256.0
    else:
        scale = raw.to(tl.int16).to(tl.float16, bitcast=True)
        centre = (raw >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    scale, centre = _grid(scale, centre, page.value_middle, spec)
    if page.fp8:
        plane = tl.arange(0, PAGE) // TOKENS
        turn = tl.where(plane < 2, plane, (plane - 2) % 3)  # see _position
        unit = tl.where(turn == 0, 1.0, tl.where(turn == 1, 0.25, 0.0625)).to(tl.float16)
        scale *= unit
    scale, centre = _spread(_pairs(scale), spec), _spread(_pairs(centre), spec)
    low = ()
    high = ()
    for p in tl.static_range(NUM_PLANES):
        low = low + (_plane(fetched[2], p, page.fp8),)
        if page.value_bits == 4:
            high = high + (_plane(fetched[3], p, page.fp8),)
    if page.value_bits == 4:
        tile = _stack(high).permute(0, 4, 3, 2, 1).reshape(spec.value_channels, PAGE // 2)
        centre = _fma(tile, _fma(scale, _both(4.0), 0), centre)
    tile = _stack(low).permute(0, 4, 3, 2, 1).reshape(spec.value_channels, PAGE // 2)
    return _halves(_fma(tile, scale, centre))


@triton.jit
def _value_grid(base, spec: tl.constexpr):
    """Pairs of value scale (low half) and centre as one integer: ``[128]`` of one group,
    ``[groups, 128]``, or ``[E, 128]`` where the groups are no powers of two."""
    page: tl.constexpr = spec.page
    pair: tl.constexpr = tl.int16 if page.fp8 else tl.int32
    field = (base + page.value_grid).to(tl.pointer_type(pair))
    entry = slot(tl.arange(0, PAGE))
    if page.value_groups > 1:
        group = tl.arange(0, spec.grid_rows)
        if spec.grid_rows > page.value_groups:
            group = tl.minimum(group, page.value_dim - 1) // page.value_group
        entry = group[:, None] * PAGE + entry[None, :]
    return tl.load(field + entry)


@triton.jit
def _spread(grid, spec: tl.constexpr):
    """A grid of groups as one of channels: ``[E, 64]``, or ``[1, 64]`` of one group."""
    if spec.grid_rows == 1:
        return grid[None, :]
    elif spec.grid_rows == spec.value_channels:
        return grid
    else:
        shape: tl.constexpr = [spec.grid_rows, spec.page.value_group, PAGE // 2]
        return grid[:, None, :].broadcast_to(shape).reshape(spec.value_channels, PAGE // 2)


# Two float16 numbers in one int32: what a 32-bit word of codes becomes on its way into a tile.


@triton.constexpr_function
def _both(number):
    """A float16 number in both halves."""
    exponent, mantissa = 15, abs(number)
    while mantissa < 1:
        exponent, mantissa = exponent - 1, mantissa * 2
    while mantissa >= 2:
        exponent, mantissa = exponent + 1, mantissa / 2
    pair = 0x10001 * (exponent << 10 | int((mantissa - 1) * 1024))
    return pair if number > 0 else pair + 0x80008000 - (1 << 32)


@triton.jit
def _fma(a, b, c):
    """``a * b + c``, by halves."""
    if _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        b, c = b + a * 0, c + a * 0
        low = _half(a) * _half(b) + _half(c)
        high = _half(a >> 16) * _half(b >> 16) + _half(c >> 16)
        low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _half(pairs):
    """The lower halves, as float32."""
    return pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _halves(pairs):
    """float16 ``[R, 2 N]`` of pairs ``[R, N]``."""
    if _ASSEMBLY:
        even, odd = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [pairs],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    else:
        even, odd = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    return (
        tl.join(even, odd).to(tl.float16, bitcast=True).reshape(pairs.shape[0], 2 * pairs.shape[1])
    )


@triton.jit
def _pairs(x):
    """Neighbours of the last dimension of float16 ``x`` as pairs.

    Added up, not split: over a sum Triton does not move what belongs before it to where every
    thread would repeat it.
    """
    bits = (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF).reshape(x.numel // 2, 2)
    pairs = tl.sum(bits << (16 * tl.arange(0, 2)), 1)
    if len(x.shape) == 1:
        return pairs
    else:
        return pairs.reshape(x.shape[0], x.shape[1] // 2)


@triton.jit
def _grid(scale, centre, middle: tl.constexpr, spec: tl.constexpr):
    """What a code in bit 4 is multiplied by, and what is added; see :func:`_plane`."""
    if spec.page.fp8:
        # The sum is exact, or nearly: E4M3 numbers have four bits.
        return scale * 2.0**7, (centre - scale * middle) * 2.0**-13
    else:
        return scale * 0.25, centre * 0.25


@triton.constexpr_function
def _position(p):
    """The bit in which :func:`_plane` leaves plane ``p``."""
    return 4 + 2 * (p if p < 2 else (p - 2) % 3)


@triton.jit
def _plane(words, p: tl.constexpr, fp8: tl.constexpr):
    """Plane ``p`` of pairs of words.

    For E4M3 grids a code stays where it is or moves to bit 4, 6 or 8: there it is a subnormal
    float16, ``code * 2**(position - 24)``, that one fma brings to scale. The range of float16 grids
    leaves no room for that: for them it becomes ``code - 3 / 2``.
    """
    position: tl.constexpr = _position(p)
    if p < 2:
        words = words << 4
    elif p > 4:
        words = words >> 6
    codes = words & ((3 << position) * 0x10001)
    if fp8:
        return codes
    else:
        # 1024 + code * 2**position
        return _fma(
            codes | 0x64006400, _both(2.0**-position), _both(-(2.0 ** (10 - position)) - 1.5)
        )


@triton.jit
def _stack(planes):
    """Eight tensors as one with three more dimensions of two, all in a thread's registers."""
    low = tl.join(tl.join(planes[0], planes[1]), tl.join(planes[2], planes[3]))
    high = tl.join(tl.join(planes[4], planes[5]), tl.join(planes[6], planes[7]))
    return tl.join(low, high)


@triton.jit
def _attend_dense(
    state,
    rows,
    logit_unit,
    keys,
    values,
    slot,
    begin,
    end,
    low,
    high,
    view,
    spec: tl.constexpr,
):
    """Adds full-precision tokens at positions ``begin .. end - 1``; the first is token ``slot``
    of ``keys`` ``[tokens, D]`` and ``values`` ``[tokens, E]``."""
    total, maximum, normalizer = state
    page: tl.constexpr = spec.page
    channel = tl.arange(0, spec.key_channels)[None, :]
    column = tl.arange(0, spec.value_channels)[None, :]
    first = tl.maximum(low - begin, 0) // spec.block_tokens
    last = tl.cdiv(tl.minimum(high, end) - begin, spec.block_tokens)
    for j in range(first, last):
        token = j * spec.block_tokens + tl.arange(0, spec.block_tokens)
        inside = (token < end - begin)[:, None]
        k = tl.load(
            keys + (slot + token[:, None]) * page.head_dim + channel,
            inside & (channel < page.head_dim),
            0.0,
        )
        v = tl.load(
            values + (slot + token[:, None]) * page.value_dim + column,
            inside & (column < page.value_dim),
            0.0,
        )
        if spec.wide:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(rows.to(k.dtype), tl.trans(k), input_precision="ieee") * logit_unit
        logits = _hide(_cap(logits, spec), begin + token, end, view, spec)
        grown = tl.maximum(maximum, tl.max(logits, 1))
        rescale = tl.exp2(maximum - grown)
        maximum = grown
        weights = tl.exp2(logits - maximum[:, None])
        normalizer = normalizer * rescale + tl.sum(weights, 1)
        total = total * rescale[:, None]
        total = tl.dot(weights.to(v.dtype), v, total, input_precision="ieee")
    return total, maximum, normalizer


@triton.jit
def _cap(logits, spec: tl.constexpr):
    """``softcap * tanh(logits / softcap)`` of logits in base two."""
    if spec.softcap is None:
        return logits
    else:
        cap: tl.constexpr = spec.softcap * _LOG2E
        return cap - 2 * cap / (tl.exp2(logits * (2 * _LOG2E / cap)) + 1)


@triton.jit
def _hide(logits, position, end, view, spec: tl.constexpr):
    """-inf for positions from ``end`` on and those that a row may not see."""
    own, start, mask, mask_rows, mask_stride = view
    position = position[None, :]
    seen = position < end
    if mask is None:
        seen = seen & (position <= own[:, None]) & (position >= start)
    else:
        entry = tl.load(mask + mask_rows[:, None] + position * mask_stride, seen, 0)
        if mask.dtype.element_ty == tl.uint8:
            seen = seen & (entry != 0)
        else:
            # A mask's lowest finite number stays one: it does not hide, it outweighs.
            bias = tl.maximum(entry.to(tl.float32), _LOWEST / 1.5) * _LOG2E
            logits += tl.where(entry == float("-inf"), float("-inf"), bias)
    if spec.window is not None:
        seen = seen & (position > own[:, None] - spec.window)
    return tl.where(seen, logits, float("-inf"))
