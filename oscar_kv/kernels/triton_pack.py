"""``pack`` in Triton: what :func:`oscar_kv.storage.codec.encode_into` means, one program a page.

Pages are read from a prompt ``[B, H, T, D]`` as it lies and written where they stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.kernels.triton_encode import token_squares, write_page
from oscar_kv.kernels.triton_pack_spec import pack_spec, signs, supports
from oscar_kv.kernels.triton_page import PAGE, page_pointer
from oscar_kv.storage.codec import encode_into
from oscar_kv.storage.layout import PageLayout


def pack_into(
    pool: Tensor,
    page_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PageLayout,
    *,
    pages: int,
) -> None:
    """Packs the first ``pages`` pages of every sequence, straight from a prompt into a pool.

    Page ``i`` of sequence ``b`` holds tokens ``128 i ..`` and becomes page
    ``page_ids[b * pages + i]``. ``fit="unbiased"`` with ``token_scale="cross_head"`` goes through
    :func:`~oscar_kv.storage.codec.encode_into` instead of a kernel.

    Args:
        pool: uint8 ``[capacity, H, page_bytes]``, contiguous.
        page_ids: int32 ``[B * pages]``; a page with a negative one is left out.
        keys: ``[B, H, T, D]``, float16, bfloat16 or float32, any strides but the last one.
        values: ``[B, H, T, E]``, the same dtype.
        layout: the page layout.
        pages: per sequence; ``128 * pages <= T``.
    """
    count = keys.shape[0] * pages
    if not count:
        return
    if not supports(layout):
        encode_into(pool, page_ids, keys, values, layout, pages=pages)
        return
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    spec = pack_spec(layout)
    states = (keys, values, *keys.stride()[:3], *values.stride()[:3], pages)
    squares = None
    if spec.page.shared_scale:
        squares = torch.empty((count, PAGE_TOKENS), dtype=torch.float32, device=keys.device)
        _shared_squares_kernel[(count,)](squares, *states, spec)
    _pack_kernel[(count, layout.num_kv_heads)](
        pool,
        page_ids,
        squares,
        *states,
        *signs(layout, keys.dtype, keys.device),
        spec,
        num_warps=spec.num_warps,
    )


@triton.jit(do_not_specialize=["pages"])
def _pack_kernel(
    pool,
    page_ids,
    squares,
    keys,
    values,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    pages,
    key_signs,
    value_signs,
    spec: tl.constexpr,
):
    page: tl.constexpr = spec.page
    number = tl.program_id(0)
    head = tl.program_id(1)
    sequence = (number // pages).to(tl.int64)
    first = (number % pages * PAGE).to(tl.int64)
    page_id = tl.load(page_ids + number)
    if page_id < 0:
        return
    shared_squares = tl.zeros([PAGE], tl.float32)
    if page.shared_scale:
        shared_squares = tl.load(squares + number * PAGE + tl.arange(0, PAGE))
    write_page(
        page_pointer(pool, page_id, head, page),
        head,
        keys + sequence * key_stride_b + head * key_stride_h + first * key_stride_t,
        key_stride_t,
        values + sequence * value_stride_b + head * value_stride_h + first * value_stride_t,
        value_stride_t,
        shared_squares,
        key_signs,
        value_signs,
        spec,
    )


@triton.jit(do_not_specialize=["pages"])
def _shared_squares_kernel(
    squares,
    keys,
    values,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    pages,
    spec: tl.constexpr,
):
    """Squared norms of keys over all heads, float32 ``[pages, 128]``."""
    page: tl.constexpr = spec.page
    number = tl.program_id(0)
    sequence = (number // pages).to(tl.int64)
    token = tl.arange(0, PAGE)
    first = (number % pages * PAGE).to(tl.int64)
    keys += sequence * key_stride_b + first * key_stride_t
    values += sequence * value_stride_b + first * value_stride_t
    total = tl.zeros([PAGE], tl.float32)
    for head in range(page.num_kv_heads):
        total += token_squares(
            keys + head * key_stride_h + token * key_stride_t,
            values + head * value_stride_h + token * value_stride_t,
            page,
        )
    tl.store(squares + number * PAGE + token, total)
