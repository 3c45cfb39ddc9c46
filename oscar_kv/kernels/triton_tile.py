"""Pages as tiles of float16 numbers: operands of a matrix unit, all 128 tokens at a time.

Device functions of :mod:`~oscar_kv.kernels.triton_extend_attend`. Two codes are dequantized at a
time, as halves of a 32-bit word: neighbouring channels of a key, neighbouring tokens of a value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.kernels.triton_attend import unit_exponent
from oscar_kv.kernels.triton_page import (
    ASSEMBLY,
    NUM_PLANES,
    PAGE,
    TOKENS,
    decode_metadata,
    half,
    metadata_pointer,
    page_pointer,
    slot,
)


@triton.constexpr_function
def tile_unit(page):
    """What the numbers of a tile have to be multiplied by."""
    return 2.0**13 if page.fp8 else 2.0**2


@triton.constexpr_function
def _grid_rows(page):
    """Rows of a page's value grids: groups, or channels where only these are a power of two."""
    groups, channels = page.value_groups, page.padded_value_dim
    return groups if groups == 1 or groups * page.value_group == channels else channels


@triton.jit
def fetch_page(pool, page_id, head, page: tl.constexpr):
    """Raw contents of a page, so that its loads can run ahead of their use.

    Words are int32, two neighbouring 16-bit words at a time: channels of keys, tokens of values.

    Returns:
        0, 1: key words ``[16, D / 2]``, low and high bits; 2, 3: value words ``[E, 8]``;
        4: float16 token scales ``[128]``; 5: int32 exponent of the value unit;
        6: key grids, for each group a pair (scales, centres) ``[D]``;
        7: value grids, see :func:`_value_grid`, or the page's first byte if there are many.
    """
    base = page_pointer(pool, page_id, head, page)
    pairs: tl.constexpr = page.padded_head_dim // 2
    pair = tl.arange(0, pairs)[None, :]
    words = (base + page.key_codes).to(tl.pointer_type(tl.int32))
    words += tl.arange(0, TOKENS)[:, None] * (page.head_dim // 2) + pair
    key_low = _load_some(words, pair, page.head_dim // 2)
    key_high = key_low
    if page.key_bits == 4:
        key_high = _load_some(words + page.head_dim * 8, pair, page.head_dim // 2)

    row = tl.arange(0, page.padded_value_dim)[:, None]
    words = (base + page.value_codes).to(tl.pointer_type(tl.int32))
    words += row * 8 + tl.arange(0, 8)[None, :]
    value_low = _load_some(words, row, page.value_blocks * 16)
    value_high = value_low
    if page.value_bits == 4:
        value_high = _load_some(words + page.value_blocks * 128, row, page.value_blocks * 16)

    channel = tl.arange(0, page.padded_head_dim)
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
    value_grid = _value_grid(base, page) if page.value_groups == 1 else base
    exponent = unit_exponent(base, page)
    return key_low, key_high, value_low, value_high, token_scale, exponent, key_grids, value_grid


@triton.jit
def _load_some(pointer, index, size: tl.constexpr):
    """Loads where ``index < size``, which costs nothing where ``size`` is a power of two."""
    if index.numel == size:
        return tl.load(pointer)
    else:
        return tl.load(pointer, index < size, 0)


@triton.jit
def key_tile(fetched, page: tl.constexpr):
    """float16 ``[128 tokens, D]``: keys without their token scale, over :func:`tile_unit`."""
    planes = ()
    for p in tl.static_range(NUM_PLANES):
        planes = planes + (_key_plane(fetched, p, page),)
    tile = _stack(planes).permute(4, 3, 2, 0, 1)  # [2, 2, 2, 16, D / 2]
    return _halves(tile.reshape(PAGE, page.padded_head_dim // 2))


@triton.jit
def _key_plane(fetched, p: tl.constexpr, page: tl.constexpr):
    group: tl.constexpr = p * TOKENS // page.key_group
    scale, centre = fetched[6][group]
    scale, centre = decode_metadata(scale, page), decode_metadata(centre, page)
    scale, centre = _grid(scale, centre, page.key_middle, page)
    scale, centre = _pairs(scale)[None, :], _pairs(centre)[None, :]
    if page.fp8 and _position(p) > 4:
        scale = _fma(scale, _both(4.0 ** (2 - _position(p) // 2)), 0)
    if page.key_bits == 4:
        centre = _fma(_plane(fetched[1], p, page.fp8), _fma(scale, _both(4.0), 0), centre)
    return _fma(_plane(fetched[0], p, page.fp8), scale, centre)


@triton.jit
def value_tile(fetched, page: tl.constexpr):
    """float16 ``[E, 128 tokens]``: values over their page's unit and over :func:`tile_unit`."""
    raw = fetched[7] if page.value_groups == 1 else _value_grid(fetched[7], page)
    if page.fp8:  # as decode_metadata
        scale = ((raw & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
        centre = ((raw & -0x8000) | ((raw >> 1) & 0x3F80)).to(tl.float16, bitcast=True) * 256.0
    else:
        scale, centre = half(raw), half(raw >> 16)
    scale, centre = _grid(scale, centre, page.value_middle, page)
    if page.fp8:
        plane = tl.arange(0, PAGE) // TOKENS
        turn = tl.where(plane < 2, plane, (plane - 2) % 3)  # see _position
        unit = tl.where(turn == 0, 1.0, tl.where(turn == 1, 0.25, 0.0625)).to(tl.float16)
        scale *= unit
    scale, centre = _spread(_pairs(scale), page), _spread(_pairs(centre), page)
    low = ()
    high = ()
    for p in tl.static_range(NUM_PLANES):
        low = low + (_plane(fetched[2], p, page.fp8),)
        if page.value_bits == 4:
            high = high + (_plane(fetched[3], p, page.fp8),)
    if page.value_bits == 4:
        tile = _stack(high).permute(0, 4, 3, 2, 1).reshape(page.padded_value_dim, PAGE // 2)
        centre = _fma(tile, _fma(scale, _both(4.0), 0), centre)
    tile = _stack(low).permute(0, 4, 3, 2, 1).reshape(page.padded_value_dim, PAGE // 2)
    return _halves(_fma(tile, scale, centre))


@triton.jit
def _value_grid(base, page: tl.constexpr):
    """Pairs of value scale (low half) and centre as one integer: ``[128]`` of one group,
    ``[groups, 128]``, or ``[E, 128]`` where the groups are no powers of two."""
    pair: tl.constexpr = tl.int16 if page.fp8 else tl.int32
    field = (base + page.value_grid).to(tl.pointer_type(pair))
    entry = slot(tl.arange(0, PAGE))
    if page.value_groups > 1:
        group = tl.arange(0, _grid_rows(page))
        if _grid_rows(page) > page.value_groups:
            group = tl.minimum(group, page.value_dim - 1) // page.value_group
        entry = group[:, None] * PAGE + entry[None, :]
    return tl.load(field + entry)


@triton.jit
def _spread(grid, page: tl.constexpr):
    """A grid of groups as one of channels: ``[E, 64]``, or ``[1, 64]`` of one group."""
    rows: tl.constexpr = _grid_rows(page)
    if rows == 1:
        return grid[None, :]
    elif rows == page.padded_value_dim:
        return grid
    else:
        shape: tl.constexpr = [rows, page.value_group, PAGE // 2]
        return grid[:, None, :].broadcast_to(shape).reshape(page.padded_value_dim, PAGE // 2)


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
    if ASSEMBLY:
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
        low, high = _fma_half(a, b, c), _fma_half(a >> 16, b >> 16, c >> 16)
        return (low & 0xFFFF) | high << 16


@triton.jit
def _fma_half(a, b, c):
    """``a * b + c`` of the lower halves, rounded once, as the lower half."""
    number = half(a).to(tl.float32) * half(b).to(tl.float32) + half(c).to(tl.float32)
    return number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _halves(pairs):
    """float16 ``[R, 2 N]`` of pairs ``[R, N]``."""
    if ASSEMBLY:
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
def _grid(scale, centre, middle: tl.constexpr, page: tl.constexpr):
    """What a code in bit 4 is multiplied by, and what is added; see :func:`_plane`."""
    if page.fp8:
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
