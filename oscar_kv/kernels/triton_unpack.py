"""``unpack`` in Triton: pages back to tokens in the original basis, for fallbacks and tests.

The rotation is undone inside the kernel: left to torch, it would write and read a float32 copy of
everything, and take some ten launches instead of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oscar_kv.kernels.triton_pack_spec import pack_spec, signs
from oscar_kv.kernels.triton_page import (
    NUM_PLANES,
    PAGE,
    TOKENS,
    decode_metadata,
    metadata_pointer,
    page_pointer,
    slot,
)
from oscar_kv.storage.codec import decode_pages
from oscar_kv.storage.layout import PageLayout


def unpack(
    pages: Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The keys and values of pages: :func:`oscar_kv.storage.codec.decode_pages` on a GPU.

    Args:
        pages: uint8 ``[N, H, page_bytes]``.
        layout: the layout they were written with.
        dtype: of the result: float16, bfloat16 or float32. The rotation keeps about 22 bits of a
            token's largest number; float64 is left to the plain torch version.

    Returns:
        keys ``[N, H, 128, D]`` and values ``[N, H, 128, E]``.
    """
    if dtype == torch.float64:
        return decode_pages(pages, layout, dtype)
    pages = pages.contiguous()
    count, heads = pages.shape[:2]
    spec = pack_spec(layout)
    shape = (count, heads, PAGE.value)
    keys = torch.empty((*shape, layout.head_dim), dtype=dtype, device=pages.device)
    values = torch.empty((*shape, layout.value_dim), dtype=dtype, device=pages.device)
    if count:
        rotations = signs(layout, torch.float16, pages.device)
        _unpack_kernel[(count, heads)](pages, keys, values, *rotations, spec=spec)
    return keys, values


@triton.jit
def _unpack_kernel(pages, keys, values, key_signs, value_signs, spec: tl.constexpr):
    page: tl.constexpr = spec.page
    number = tl.program_id(0)
    head = tl.program_id(1)
    base = page_pointer(pages, number, head, page)
    first_row = (number.to(tl.int64) * page.num_kv_heads + head) * PAGE
    word = tl.arange(0, TOKENS)[:, None]

    channel = tl.arange(0, spec.key_width)[None, :]
    exists = channel < page.head_dim
    signs = _load_signs(key_signs, spec.key_width, page.head_dim)
    codes = (base + page.key_codes).to(tl.pointer_type(tl.int16))
    codes += word * page.head_dim + channel
    for p in range(NUM_PLANES):
        token = TOKENS * p + tl.arange(0, TOKENS)
        group = TOKENS * p // page.key_group * page.head_dim
        scale = _metadata(base, page.key_scale, group + channel, exists, page)
        centre = _metadata(base, page.key_centre, group + channel, exists, page)
        code = _codes(codes, p, TOKENS * page.head_dim, exists, page.key_bits)
        factor = spec.key_unit * _token_scales(base, head, token, page)
        _store_rows(
            keys + (first_row + token) * page.head_dim,
            (code - page.key_middle) * scale + centre,
            signs,
            factor[:, None],
            page.head_dim,
        )

    column = tl.arange(0, spec.value_width)[None, :]
    group = column // spec.group_width
    inside = column % spec.group_width
    exists = (group < page.value_groups) & (inside < page.value_group)
    signs = _load_signs(value_signs, spec.value_width, page.value_dim)
    codes = (base + page.value_codes).to(tl.pointer_type(tl.int16))
    codes += (group * page.value_group + inside) * TOKENS + word
    factor = spec.value_unit * tl.load((base + page.value_unit).to(tl.pointer_type(tl.float32)))
    for p in range(NUM_PLANES):
        token = TOKENS * p + tl.arange(0, TOKENS)
        entry = 2 * (group * PAGE + slot(token)[:, None])
        scale = _metadata(base, page.value_grid, entry, exists, page)
        centre = _metadata(base, page.value_grid, entry + 1, exists, page)
        set_size: tl.constexpr = page.value_blocks * TOKENS * TOKENS
        code = _codes(codes, p, set_size, exists, page.value_bits)
        _store_rows(
            values + (first_row + token) * page.value_dim,
            (code - page.value_middle) * scale + centre,
            signs,
            factor,
            page.value_dim,
        )


@triton.jit
def _load_signs(signs, rows: tl.constexpr, channels: tl.constexpr):
    columns: tl.constexpr = triton.next_power_of_2(channels)
    row = tl.arange(0, rows)[:, None]
    return tl.load(signs + row * columns + tl.arange(0, columns)[None, :])


@triton.jit
def _codes(words, p, set_size: tl.constexpr, exists, bits: tl.constexpr):
    """Codes of plane ``p`` as float32, zero where there is no channel."""
    code = (tl.load(words, mask=exists, other=0) >> (2 * p)) & 3
    if bits == 4:
        high = (tl.load(words + set_size, mask=exists, other=0) >> (2 * p)) & 3
        code += 4 * high
    return code.to(tl.float32)


@triton.jit
def _metadata(base, offset: tl.constexpr, entry, exists, page: tl.constexpr):
    raw = tl.load(metadata_pointer(base, offset, page) + entry, mask=exists, other=0)
    return decode_metadata(raw, page).to(tl.float32)


@triton.jit
def _token_scales(base, head, token, page: tl.constexpr):
    entry = slot(token)
    offset = entry * 2
    if page.shared_scale:
        home = entry // page.scales_per_page - head
        offset = home * page.page_bytes + entry % page.scales_per_page * 2
    scales = (base + page.token_scale + offset).to(tl.pointer_type(tl.float16))
    return tl.load(scales).to(tl.float32)


@triton.jit
def _store_rows(rows, x, signs, factor, channels: tl.constexpr):
    """``factor * x @ signs`` at pointers ``[16]``; ``x`` in two float16 parts, 22 bits of it.

    What would leave float16 saturates: a reconstruction may overshoot what was stored.
    """
    largest = tl.max(tl.abs(x), 1)
    unit = tl.where(largest > 0, largest, 1.0)[:, None]
    x = x / unit
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    x = tl.dot(low, signs, tl.dot(high, signs)) * (unit * factor)
    kind: tl.constexpr = rows.dtype.element_ty
    if kind == tl.float16:
        x = tl.clamp(x, -65504.0, 65504.0)
    channel = tl.arange(0, signs.shape[1])[None, :]
    tl.store(rows[:, None] + channel, x.to(kind), mask=channel < channels)
