"""Attention of many new queries over packed pages: chunked prefill, multi-turn, verification.

A program holds a block of query rows of one KV head (the group's query heads side by side), walks
over the sequence's pages and dequantizes each into two float16 tiles, once for all its rows. The
dequantized prefix never leaves the multiprocessor. Pages live in the rotated basis: their rotated
sum is turned back by one product with the signs of the rotation, and the softmax then goes on over
the full-precision tokens (sinks, tail, fresh states) in the original basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.device import multiprocessors
from oscar_kv.kernels.triton_extend_kernel import combine_rows, extend_kernel
from oscar_kv.kernels.triton_page import PageSpec, page_spec
from oscar_kv.kernels.triton_rotate import rotate_queries, rotation_signs

_PROGRAMS_PER_SM = 2
# Pages that are worth a program of their own.
_FEWEST_PAGES = 4
_COMBINED_ROWS = 4


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


def extend(call: AttentionCall) -> Tensor:
    """:func:`oscar_kv.kernels.reference.attend` for many query rows.

    Products with packed pages are float16 with float32 sums; those with full-precision tokens are
    in their dtype, float32 where the query's is another.
    """
    query, packed, new_keys, new_values = call.query, call.packed, call.new_keys, call.new_values
    visibility = call.visibility
    layout, device = packed.layout, query.device
    batch, num_heads, num_queries, _ = query.shape
    group = num_heads // layout.num_kv_heads
    wide = query.dtype != packed.dtype or query.dtype == torch.float32
    large = max(layout.head_dim, layout.value_dim) > 128
    spec = ExtendSpec(
        page=page_spec(layout),
        group=group,
        window=visibility.sliding_window,
        softcap=call.softcap,
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
    output = call.new_result()
    blocks = triton.cdiv(group * num_queries, spec.block_rows)
    parts = _parts(blocks * layout.num_kv_heads * batch, packed.block_table.shape[1], device)
    sums = statistics = None
    if parts > 1:
        sums = torch.empty((parts, *output.shape), dtype=torch.float32, device=device)
        statistics = torch.empty((*sums.shape[:-1], 2), dtype=torch.float32, device=device)
    extend_kernel[(blocks * parts, layout.num_kv_heads, batch)](
        output,
        sums,
        statistics,
        parts,
        query,
        query.stride(),
        rotated,
        factors,
        signs,
        packed.page_data,
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
        call.s_aux,
        mask,
        (0, 0, 0, 0) if mask is None else mask.stride(),
        num_queries,
        call.scaling,
        unit,
        spec,
        num_warps=8 if large else 4,
        num_stages=1 if large else 2,
    )
    if parts > 1:
        rows = batch * num_heads * num_queries
        combine_rows[(triton.cdiv(rows, _COMBINED_ROWS),)](
            output,
            sums,
            statistics,
            rows,
            parts,
            layout.value_dim,
            spec.page.padded_value_dim,
            _COMBINED_ROWS,
        )
    return output


def _parts(programs: int, pages: int, device: torch.device) -> int:
    """How many programs share the pages of one block of rows, where there are few blocks."""
    at_once = _PROGRAMS_PER_SM * multiprocessors(device)
    return max(1, min(at_once // programs, pages // _FEWEST_PAGES))
