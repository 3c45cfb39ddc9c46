"""The grids of :mod:`oscar_kv.core.grid` as Triton device functions, for ``pack`` and ``append``.

A float32 tile ``x [rows, groups, columns]`` is fitted along its columns, in whatever unit it comes.
Metadata is stored in another, ``unit`` times as large: a fit commutes with a factor, so it touches
only the few numbers of a group. Where the last columns or groups are no channels, ``padded``,
``real`` tells those that are. What belongs to a group is ``[rows, groups]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.core.grid import SHARE_OF_RANGE, STEP_OVER_DEVIATION
from oscar_kv.kernels.triton_page import ASSEMBLY

_STEP = tl.constexpr(STEP_OVER_DEVIATION)
_SHARE = tl.constexpr(SHARE_OF_RANGE)
_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
# Added to a float32 and subtracted again, it rounds it to an integer (to even) below 2**22.
_MAGIC = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def extrema(x, real, padded: tl.constexpr):
    """Smallest and largest number of every group; infinite where a token is not finite."""
    if padded:
        return tl.min(tl.where(real, x, float("inf")), 2), tl.max(
            tl.where(real, x, -float("inf")), 2
        )
    else:
        return tl.min(x, 2), tl.max(x, 2)


@triton.jit
def fit(
    x,
    low,
    high,
    count: tl.constexpr,
    unit,
    real,
    padded: tl.constexpr,
    bits: tl.constexpr,
    unbiased: tl.constexpr,
    fp8: tl.constexpr,
):
    """Codes (float32, the shape of ``x``), and the scale and middle of every group as stored.

    ``low`` and ``high`` are the :func:`extrema`, ``count`` the real columns of a group.
    """
    if unbiased:
        return _fit_unbiased(x, low, high, count, unit, real, padded, bits, fp8)
    else:
        return _fit_minmax(x, low, high, unit, bits, fp8)


@triton.jit
def _fit_unbiased(
    x,
    low,
    high,
    count: tl.constexpr,
    unit,
    real,
    padded: tl.constexpr,
    bits: tl.constexpr,
    fp8: tl.constexpr,
):
    levels: tl.constexpr = 2**bits - 1
    mean = tl.sum(x, 2) / count  # what is no channel is zero
    centred = _real_only(x - mean[:, :, None], real, padded)
    variance = tl.sum(centred * centred, 2)  # and covariance: times count
    if bits == 2:
        inverse = tl.rsqrt(tl.maximum(variance / count, _TINY)) / _STEP
        middle = 0.5 * mean + 0.25 * (low + high)
    else:
        inverse = levels / _SHARE / tl.maximum(high - low, _TINY)
        middle = 0.5 * (low + high)
    codes = _nearest_codes(x, inverse, levels / 2 - middle * inverse, real, padded, levels)
    codes_mean = tl.sum(codes, 2) / count
    covariance = tl.sum(x * codes, 2) - count * mean * codes_mean
    scale = tl.where(covariance > 0, variance / tl.maximum(covariance, _TINY), 0.0)
    scale = round_metadata(scale * unit, fp8)
    middle = round_metadata(mean * unit - scale * (codes_mean - levels / 2), fp8)
    return codes, scale, middle


@triton.jit
def _fit_minmax(x, low, high, unit, bits: tl.constexpr, fp8: tl.constexpr):
    levels: tl.constexpr = 2**bits - 1
    scale = round_metadata((high - low) * unit / levels, fp8)
    constant = round_metadata(tl.abs(low) * unit, fp8)
    constant = tl.where(constant > 0, constant, 1.0)
    scale = tl.where(scale > 0, scale, constant)
    inverse = unit / scale
    zero_point = (-low * inverse + _MAGIC) - _MAGIC
    nearest = (x * inverse[:, :, None] + _MAGIC) + (zero_point - _MAGIC)[:, :, None]
    codes = tl.minimum(tl.maximum(nearest, 0.0), levels)
    return codes, scale, round_metadata(scale * (levels / 2 - zero_point), fp8)


@triton.jit
def _nearest_codes(x, slope, offset, real, padded: tl.constexpr, levels: tl.constexpr):
    """``round(x * slope + offset)`` within ``0 .. levels``, and 0 where there is no channel."""
    slope = slope * (1.0 / levels)
    offset = offset * (1.0 / levels)
    if ASSEMBLY:
        share = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [x, slope[:, :, None], offset[:, :, None]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        share = tl.clamp(x * slope[:, :, None] + offset[:, :, None], 0.0, 1.0)
    return _real_only((share * levels + _MAGIC) - _MAGIC, real, padded)


@triton.jit
def _real_only(x, real, padded: tl.constexpr):
    if padded:
        return tl.where(real, x, 0.0)
    else:
        return x


@triton.jit
def round_fp16(x):
    """To the nearest float16, saturating; float32 out."""
    x = tl.clamp(x, -65504.0, 65504.0)
    if ASSEMBLY:
        # Seen as a float16, Triton would share it among threads before what is computed from it.
        return tl.inline_asm_elementwise(
            "{ .reg .b16 half; cvt.rn.f16.f32 half, $1; cvt.f32.f16 $0, half; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return x.to(tl.float16).to(tl.float32)


@triton.jit
def round_metadata(x, fp8: tl.constexpr):
    """float32 ``x`` as it will be read from metadata, saturating."""
    if fp8:
        # Adding a power of two whose last mantissa bit weighs as much as E4M3's rounds to it.
        x = tl.clamp(x, -448.0, 448.0)
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
        magic = ((exponent + 20) << 23).to(tl.float32, bitcast=True) * 1.5
        return (x + magic) - magic
    else:
        return round_fp16(x)


@triton.jit
def encode_metadata(rounded, fp8: tl.constexpr):
    """The bytes (uint8) or float16 of numbers from :func:`round_metadata`."""
    if fp8:
        # Over 2**120, an E4M3 number has its own bits as a float32, subnormal or not.
        bits = (rounded * 2.0**-120).to(tl.int32, bitcast=True)
        return (((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return rounded.to(tl.float16)


@triton.jit
def encode_pair(scale, middle, fp8: tl.constexpr):
    """int32 with the stored scale in its low, the middle in its high half; of int16 for bytes."""
    scale = encode_metadata(scale, fp8)
    middle = encode_metadata(middle, fp8)
    if fp8:
        return scale.to(tl.int32) | (middle.to(tl.int32) << 8)
    else:
        low = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (middle.to(tl.int16, bitcast=True).to(tl.int32) << 16)
