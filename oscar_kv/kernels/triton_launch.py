"""Launches decode attention: how a call becomes two kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from oscar_kv.core.rotation import rotation_factors
from oscar_kv.kernels.masking import Visibility
from oscar_kv.kernels.triton_combine import combine_parts
from oscar_kv.kernels.triton_decode import decode_part
from oscar_kv.kernels.triton_page import page_spec
from oscar_kv.kernels.triton_rotate import rotate_queries
from oscar_kv.storage.packed import PackedKV

# Programs of one warp that an SM holds at the registers which `decode_part` takes.
_PROGRAMS_PER_SM = 12
# More pages per program only make the last ones late.
_MOST_PAGES = 22


def decode(
    query: Tensor,
    packed: PackedKV,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
    visibility: Visibility,
) -> Tensor:
    """Attention of a few new tokens; arguments and result of the reference's ``attend``."""
    layout = packed.layout
    page = page_spec(layout, _capability(packed.device) >= (8, 9))
    if scaling < 0:
        query, scaling = -query, -scaling
    query = query.contiguous()
    batch, num_heads, num_queries, _ = query.shape
    group = num_heads // layout.num_kv_heads
    rows = group * num_queries
    columns = 8 if rows <= 8 else 16
    column_blocks = -(-rows // columns)
    tokens = 32 if max(page.padded_head_dim, page.padded_value_dim) <= 128 else 16
    tail_slots = packed.tail_keys.shape[2]
    sink_slots = packed.sink_keys.shape[2]
    early = _launches_early(query.device)
    page_splits = _page_splits(packed, column_blocks)
    tail_blocks = -(-packed.most_tail_tokens // tokens)
    has_new = new_keys is not None
    dense = tail_blocks + -(-sink_slots // tokens) + (-(-num_queries // tokens) if has_new else 0)
    parts = page_splits + dense
    device = query.device
    sums = torch.empty(
        (batch, num_heads, num_queries, parts, page.value_dim), dtype=torch.float32, device=device
    )
    maxima = torch.empty((*sums.shape[:4], 2), dtype=torch.float32, device=device)
    rotated, factor = (query, query) if page.rotates_in_kernel else rotate_queries(query)
    mask, mask_kind, mask_strides = _mask_arguments(visibility.mask, query)
    window = visibility.sliding_window
    grid = (parts * layout.num_kv_heads * column_blocks * batch,)
    decode_part[grid](
        query,
        rotated,
        factor,
        packed.pool.data,
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
        page_splits,
        scaling,
        softcap or 0.0,
        window or 0,
        page=page,
        group=group,
        num_queries=num_queries,
        columns=columns,
        tail_slots=tail_slots,
        tail_blocks=tail_blocks,
        sink_slots=sink_slots,
        tokens=tokens,
        dense_blocks=dense,
        page_mask=_page_mask(packed, visibility, has_new),
        mask_kind=mask_kind,
        has_new=has_new,
        has_starts=visibility.starts is not None,
        has_window=window is not None,
        has_softcap=softcap is not None,
        stages=2,
        launch_dependents=early,
        num_warps=1,
        maxnreg=168 if columns == 8 else 255,
    )
    out = torch.empty((*query.shape[:3], page.value_dim), dtype=query.dtype, device=device)
    outer, inner = rotation_factors(page.value_dim, device)
    parts_padded = 1 << (parts - 1).bit_length()
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
        page=page,
        rows=rows,
        num_queries=num_queries,
        outer_size=outer.shape[0],
        outer_padded=1 << (outer.shape[0] - 1).bit_length(),
        inner_size=inner.shape[0],
        parts_padded=parts_padded,
        chunk=chunk,
        has_sink_logits=s_aux is not None,
        dependent_launch=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )
    return out


def _page_splits(packed: PackedKV, column_blocks: int) -> int:
    """Programs that share the pages of one sequence, KV head and block of columns."""
    pages = packed.most_pages
    if not pages:
        return 0
    others = packed.batch_size * packed.layout.num_kv_heads * column_blocks
    at_once = _PROGRAMS_PER_SM * _multiprocessors(packed.device) // others
    return min(pages, max(at_once, -(-pages // _MOST_PAGES)))


@lru_cache(maxsize=8)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _launches_early(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one it waits for has finished."""
    return _capability(device) >= (9, 0)


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _page_mask(packed: PackedKV, visibility: Visibility, has_new: bool) -> int:
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
