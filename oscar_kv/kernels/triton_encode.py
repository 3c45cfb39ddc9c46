"""One page from 128 tokens, as a Triton device function: rotate, fit, pack.

Keys are rotated into ``[channels, tokens]`` and values into ``[tokens, channels]``, so that in both
a quantization group is a run of columns: in the accumulator layout of the matrix units the sums of
a fit, and the eight planes of a key word, then lie in the registers of few threads. Only the
rotated tile is kept: codes are cheaper to compute again than to hold.

A token with NaN or Inf in its key or value, or so large that its rotation or its squared norm
leaves float32, is stored as zeros. The rotation spreads a value over all channels, so the extrema
that the fit needs anyway tell.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.core.scaling import REFIT_LIMITS
from oscar_kv.kernels.triton_fit import encode_metadata, encode_pair, extrema, fit, round_fp16
from oscar_kv.kernels.triton_page import (
    INTERPRETED,
    NUM_PLANES,
    PAGE,
    TOKENS,
    metadata_pointer,
    slot,
)
from oscar_kv.storage.codec import VALUE_PEAK

_REFIT_LOW = tl.constexpr(REFIT_LIMITS[0])
_REFIT_HIGH = tl.constexpr(REFIT_LIMITS[1])
_INVERSE_PEAK = tl.constexpr(1 / VALUE_PEAK)
_ON_DEVICE = tl.constexpr(not INTERPRETED)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def write_page(
    base,
    head,
    keys,
    key_stride,
    values,
    value_stride,
    shared_squares,
    key_signs,
    value_signs,
    spec: tl.constexpr,
):
    """Writes the page at ``base`` (uint8 pointer).

    Args:
        keys, values: pointers to the first of 128 tokens, a stride apart.
        shared_squares: float32 ``[128]``, see :func:`token_squares`, summed over all heads; read
            where heads share token scales.
        key_signs, value_signs: from :func:`~oscar_kv.kernels.triton_pack_spec.signs`.
    """
    page: tl.constexpr = spec.page
    finite = _write_values(base, values, value_stride, value_signs, spec)
    tile = _rotate(keys, key_stride, key_signs, page.head_dim, spec.key_width, True)
    kind: tl.constexpr = keys.dtype.element_ty
    squares = _sum_rows(tile * tile, kind, base) * (spec.key_unit * spec.key_unit)
    finite = finite & (squares < _INFINITY)
    if tl.min(finite.to(tl.int32), 0) == 0:
        tile = tl.where(finite[None, :], tile, 0.0)
        squares = tl.where(finite, squares, 0.0)
        tl.debug_barrier()  # the grids of these values have been written
        _write_value_grids(base, tl.zeros([PAGE, 1], tl.int32), finite[:, None] == 0, spec)
    total = shared_squares if page.shared_scale else squares
    _write_keys(base, head, tile, squares, total, kind, spec)


@triton.jit
def _write_keys(base, head, tile, squares, total, kind: tl.constexpr, spec: tl.constexpr):
    """``tile``: key signs times keys, ``[channels, 128]``; ``total``: what the norms come from."""
    page: tl.constexpr = spec.page
    scale = tl.full([PAGE], 1.0, tl.float32)
    if spec.exponent == 1:
        scale = tl.where(total > 0, tl.sqrt(total), 1.0)
    elif spec.exponent > 0:
        scale = tl.where(total > 0, tl.exp2(spec.exponent * 0.5 * tl.log2(total)), 1.0)
    if page.fp8:
        heads: tl.constexpr = page.num_kv_heads if page.shared_scale else 1
        mean_square = tl.sum(total / (scale * scale), 0) / (PAGE * page.head_dim * heads)
        scale = scale * tl.where(mean_square > 0, tl.sqrt(mean_square), 1.0)
    scale = _never_zero(scale)

    groups: tl.constexpr = page.key_groups
    shape: tl.constexpr = (spec.key_width, groups, page.key_group)
    unit_keys = tl.reshape(tile * (spec.key_unit / scale)[None, :], shape)
    real = tl.full([1, 1, 1], True, tl.int1)  # what is no channel is a row of its own
    low, high = extrema(unit_keys, real, False)
    codes, step, middle = fit(
        unit_keys,
        low,
        high,
        page.key_group,
        1.0,
        real,
        False,
        page.key_bits,
        spec.unbiased,
        page.fp8,
    )
    if spec.refit_scale:
        zero = middle - step * ((2**page.key_bits - 1) / 2)
        found = unit_keys * (codes * step[:, :, None] + zero[:, :, None])
        found = _sum_rows(tl.reshape(found, (spec.key_width, PAGE)), kind, base)
        ratio = tl.where(found > 0, squares / (scale * scale) / tl.maximum(found, 1e-30), 1.0)
        scale = _never_zero(scale * tl.clamp(ratio, _REFIT_LOW, _REFIT_HIGH))
    scale = tl.where(total > 0, scale, 0.0)  # zeros must read as zeros on any grid

    channel = tl.arange(0, spec.key_width)
    word = tl.arange(0, TOKENS)
    is_channel = channel < page.head_dim
    target = base + page.key_codes + 2 * (word[None, :] * page.head_dim + channel[:, None])
    target = target.to(tl.pointer_type(tl.int16))
    codes = tl.reshape(codes, (spec.key_width, PAGE))
    for index in tl.static_range(page.key_bits // 2):
        words = _key_words(_two_bits(codes, index, page.key_bits))
        tl.store(target + index * TOKENS * page.head_dim, words, mask=is_channel[:, None])
    entry = tl.arange(0, groups)[None, :] * page.head_dim + channel[:, None]
    target = metadata_pointer(base, page.key_scale, page) + entry
    tl.store(target, encode_metadata(step, page.fp8), mask=is_channel[:, None])
    target = metadata_pointer(base, page.key_centre, page) + entry
    tl.store(target, encode_metadata(middle, page.fp8), mask=is_channel[:, None])
    entry = slot(tl.arange(0, PAGE))
    target = (base + page.token_scale).to(tl.pointer_type(tl.float16))
    if page.shared_scale:
        entry -= head * page.scales_per_page
        mine = (entry >= 0) & (entry < page.scales_per_page)
        tl.store(target + entry, scale.to(tl.float16), mask=mine)
    else:
        tl.store(target + entry, scale.to(tl.float16))


@triton.jit
def _write_values(base, values, stride, signs, spec: tl.constexpr):
    """Returns which tokens have finite values, bool ``[128]``; the others read as zeros."""
    page: tl.constexpr = spec.page
    rows = _rotate(values, stride, signs, page.value_dim, spec.value_width, False)
    rows = tl.reshape(rows, (PAGE, spec.groups_width, spec.group_width))
    group = tl.arange(0, spec.groups_width)[None, :]
    exists = group < page.value_groups
    inside = tl.arange(0, spec.group_width)[None, None, :]
    real = exists[:, :, None] & (inside < page.value_group)
    low, high = extrema(rows, real, spec.padded)
    largest = tl.maximum(tl.abs(low), tl.abs(high))
    good = largest < _INFINITY
    finite = tl.min((good | (exists == 0)).to(tl.int32), 1) == 1
    unit = spec.value_unit
    # The power of two that brings the largest value of the page into (peak / 2, peak].
    largest = tl.max(tl.max(tl.where(good & exists, largest, 0.0), 1), 0)
    largest *= spec.value_unit * _INVERSE_PEAK
    exponent = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 127 - 60), 127 + 60)
    target = (base + page.value_unit).to(tl.pointer_type(tl.float32))
    tl.store(target, (exponent << 23).to(tl.float32, bitcast=True))
    unit *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    codes, step, middle = fit(
        rows,
        low,
        high,
        page.value_group,
        unit,
        real,
        spec.padded,
        page.value_bits,
        spec.unbiased,
        page.fp8,
    )
    # A token has its own grids, so one that is not finite spoils no other.
    step = tl.where(finite[:, None], step, 0.0)
    middle = tl.where(finite[:, None], middle, 0.0)
    _write_value_grids(base, encode_pair(step, middle, page.fp8), exists, spec)

    word = tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, spec.value_width)[None, :]
    group = column // spec.group_width
    inside = column % spec.group_width
    exists = (group < page.value_groups) & (inside < page.value_group)
    target = (base + page.value_codes).to(tl.pointer_type(tl.int16)) + word
    codes = tl.reshape(codes, (PAGE, spec.value_width))
    for index in tl.static_range(page.value_bits // 2):
        words = _value_words(_two_bits(codes, index, page.value_bits))
        channel = group * page.value_group + inside
        tl.store(target + channel * TOKENS, words, mask=exists)
        if page.value_blocks * TOKENS != page.value_dim:  # the rest of the last block
            channel = page.value_dim + tl.arange(0, TOKENS)[None, :]
            rest = channel < page.value_blocks * TOKENS
            tl.store(target + channel * TOKENS, tl.zeros([TOKENS, TOKENS], tl.int16), mask=rest)
        target += page.value_blocks * TOKENS * TOKENS
    return finite


@triton.jit
def _write_value_grids(base, pairs, mask, spec: tl.constexpr):
    """``pairs [128, groups or 1]`` of :func:`encode_pair` to every value group of the page."""
    page: tl.constexpr = spec.page
    group = tl.arange(0, spec.groups_width)[None, :]
    entry = group * PAGE + slot(tl.arange(0, PAGE))[:, None]
    kind = tl.pointer_type(tl.int16 if page.fp8 else tl.int32)
    target = (base + page.value_grid).to(kind)
    tl.store(target + entry, pairs.to(kind.element_ty), mask=mask & (group < page.value_groups))


@triton.jit
def _rotate(
    states,
    stride,
    signs,
    channels: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
):
    """128 tokens at ``states`` times signs: ``[128, width]``, or its transpose."""
    padded: tl.constexpr = triton.next_power_of_2(channels)
    # A whole row at a time, if it fits into shared memory (and, on Ampere, into registers).
    most: tl.constexpr = 32 if states.dtype.element_ty.primitive_bitwidth == 32 else 128
    chunk: tl.constexpr = min(padded, most if padded <= 128 else min(most, 64))
    token = tl.arange(0, PAGE)
    column = tl.arange(0, width)
    if transposed:
        tile = tl.zeros([width, PAGE], tl.float32)
    else:
        tile = tl.zeros([PAGE, width], tl.float32)
    for begin in range(0, channels, chunk):
        channel = begin + tl.arange(0, chunk)
        exists = channel[None, :] < channels
        source = states + token[:, None] * stride + channel[None, :]
        x = tl.load(source) if channels % chunk == 0 else tl.load(source, mask=exists, other=0.0)
        r = tl.load(signs + column[:, None] * padded + channel[None, :])
        if transposed:
            tile = tl.dot(r, tl.trans(x), tile, input_precision="ieee")
        else:
            tile = tl.dot(x, tl.trans(r), tile, input_precision="ieee")
    return tile


@triton.jit
def load_rows(rows, exists, channels: tl.constexpr):
    """The rows ``[N, padded channels]`` at pointers ``[N]``, zeros where there is nothing."""
    channel = tl.arange(0, triton.next_power_of_2(channels))[None, :]
    mask = exists[:, None] & (channel < channels)
    return tl.load(rows[:, None] + channel, mask=mask, other=0.0)


@triton.jit
def token_squares(keys, values, page: tl.constexpr):
    """Squared norms ``[N]`` of the keys at pointers ``[N]``; 0 where a token is not finite."""
    all_ = tl.full([keys.shape[0]], True, tl.int1)
    key = load_rows(keys, all_, page.head_dim).to(tl.float32)
    value = load_rows(values, all_, page.value_dim).to(tl.float32)
    squares = tl.sum(key * key, 1)
    return tl.where((squares < _INFINITY) & (tl.sum(value * 0.0, 1) == 0), squares, 0.0)


@triton.jit
def _sum_rows(x, kind: tl.constexpr, scratch):
    """Sums ``[128]`` over the rows of ``x [M, 128]``.

    A column lies in many threads: a reduction would shuffle for each. For states ``kind`` of 16
    bits a product with ones does it; rounding to bfloat16 first costs a sum of 64 products or more
    about 3e-4. (Before Hopper the product would drag ``x`` into another layout.) And the sums, with
    all that is computed from them, would stay in every thread that has the column: by way of
    memory, 512 bytes at ``scratch``, they are spread over the threads.
    """
    by_product: tl.constexpr = kind.primitive_bitwidth == 16 and _ON_DEVICE
    if by_product and tl.target_info.cuda_capability_geq(9):
        ones = tl.full([TOKENS, x.shape[0]], 1.0, tl.bfloat16)
        sums = tl.max(tl.dot(ones, x.to(tl.bfloat16)), 0)
    else:
        sums = tl.sum(x, 0)
    place = scratch.to(tl.pointer_type(tl.float32)) + tl.arange(0, PAGE)
    tl.store(place, sums)
    tl.debug_barrier()
    sums = tl.load(place)
    tl.debug_barrier()
    return sums


@triton.jit
def _key_words(codes):
    """int16 words ``[channels, 16]`` of 2-bit codes, float32 ``[channels, 128]``."""
    codes = tl.reshape(codes, (codes.shape[0], NUM_PLANES, TOKENS))
    weight = (1 << (2 * tl.arange(0, NUM_PLANES))).to(tl.float32)
    return tl.sum(codes * weight[None, :, None], 1).to(tl.int32).to(tl.int16)


@triton.jit
def _value_words(codes):
    """int16 words ``[16, columns]`` of 2-bit codes, float32 ``[128, columns]``.

    The planes of a word lie in threads of several warps. A matrix unit adds them up exactly.
    """
    word = tl.arange(0, TOKENS)[:, None]
    token = tl.arange(0, PAGE)[None, :]
    weight = tl.where(token % TOKENS == word, 1 << (2 * (token // TOKENS)), 0).to(tl.float16)
    return tl.dot(weight, codes.to(tl.float16)).to(tl.int32).to(tl.int16)


@triton.jit
def _two_bits(codes, index: tl.constexpr, bits: tl.constexpr):
    """The low (``index`` 0) or high two bits of 4-bit codes; 2-bit codes as they are."""
    if bits == 4:
        high = tl.floor(codes * 0.25)
        return codes - 4.0 * high if index == 0 else high
    else:
        return codes


@triton.jit
def _never_zero(scale):
    return round_fp16(tl.maximum(scale, 2.0**-24))
