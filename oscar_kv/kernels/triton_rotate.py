"""Rotation of query rows on the GPU, and of accumulators inside other kernels.

A Hadamard matrix holds nothing but +1 and -1 (and zeros between the blocks of a block-diagonal
one), which float16 holds exactly: with the rows split into a high and a low float16 part, a matrix
unit rotates them as accurately as float32 arithmetic would.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from oscar_kv.core.rotation import factor, rotation_matrix

_BLOCK_ROWS = 64


@lru_cache(maxsize=32)
def rotation_signs(head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """The rotation as signs and their unit: ``R = unit * signs``.

    Args:
        head_dim: D.
        device: of the result.

    Returns:
        float16 ``[D, D]`` of -1, 0 and 1 (cached: do not write to it), and the unit.
    """
    _, base, sylvester = factor(head_dim)
    with torch.inference_mode(False):
        signs = rotation_matrix(head_dim, torch.float64).sign()
        return signs.to(torch.float16).to(device), (base * sylvester) ** -0.5


def rotate_queries(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated rows as float16 with a float32 factor each, so that no magnitude is lost.

    Args:
        rows: ``[.., D]``, up to four dimensions, any strides, float16, bfloat16 or float32.

    Returns:
        float16 ``[.., D]``, contiguous, whose rows have a largest magnitude of one (or are zero),
        and float32 factors ``[..]``: ``rows @ R`` is one times the other.
    """
    *shape, head_dim = rows.shape
    view = rows[(None,) * (4 - rows.ndim)]
    rotated = torch.empty(rows.shape, dtype=torch.float16, device=rows.device)
    factors = torch.empty(shape, dtype=torch.float32, device=rows.device)
    signs, unit = rotation_signs(head_dim, rows.device)
    _rotate_kernel[(triton.cdiv(factors.numel(), _BLOCK_ROWS),)](
        view,
        view.stride(),
        view.shape[1],
        view.shape[2],
        signs,
        rotated,
        factors,
        factors.numel(),
        unit,
        head_dim,
        triton.next_power_of_2(head_dim),
        _BLOCK_ROWS,
    )
    return rotated, factors


@triton.jit(do_not_specialize=["size_1", "size_2", "num_rows"])
def _rotate_kernel(
    rows,
    strides,
    size_1,
    size_2,
    signs,
    rotated,
    factors,
    num_rows,
    unit,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_rows: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.arange(0, padded_dim)
    exists = (row < num_rows)[:, None] & (channel < head_dim)[None, :]
    source = (
        (row // size_2 // size_1).to(tl.int64) * strides[0]
        + (row // size_2 % size_1).to(tl.int64) * strides[1]
        + (row % size_2).to(tl.int64) * strides[2]
    )
    x = tl.load(rows + source[:, None] + channel[None, :] * strides[3], exists, 0.0)
    y = rotate_rows(x.to(tl.float32), signs, head_dim, False)
    largest = tl.max(tl.abs(y), 1)
    divisor = tl.where(largest == 0, 1.0, largest)
    target = row.to(tl.int64)[:, None] * head_dim + channel[None, :]
    tl.store(rotated + target, (y / divisor[:, None]).to(tl.float16), exists)
    tl.store(factors + row, divisor * unit, row < num_rows)


@triton.jit
def rotate_rows(x, signs, head_dim: tl.constexpr, back: tl.constexpr):
    """Rotates rows inside a kernel, but for the unit of the signs.

    Args:
        x: float32 ``[M, N]``, N the next power of two of ``head_dim``; what pads it is ignored.
        signs: see :func:`rotation_signs`.
        back: the other way, by the transpose.

    Returns:
        float32 ``[M, N]``, to about 22 bits of the largest number of each row.
    """
    padded_dim: tl.constexpr = x.shape[1]
    largest = tl.max(tl.abs(x), 1)
    divisor = tl.where(largest == 0, 1.0, largest)
    x = x / divisor[:, None]
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    if padded_dim <= 128:
        factor = _load_signs(signs, 0, padded_dim, padded_dim, head_dim, back)
        y = tl.dot(low, factor, tl.dot(high, factor))
    else:  # by halves, which fit into shared memory
        half: tl.constexpr = padded_dim // 2
        factor = _load_signs(signs, 0, half, padded_dim, head_dim, back)
        left = tl.dot(low, factor, tl.dot(high, factor))
        factor = _load_signs(signs, half, half, padded_dim, head_dim, back)
        right = tl.dot(low, factor, tl.dot(high, factor))
        y = tl.join(left, right).permute(0, 2, 1).reshape(x.shape[0], padded_dim)
    return y * divisor[:, None]


@triton.jit
def _load_signs(
    signs,
    first: tl.constexpr,
    columns: tl.constexpr,
    padded_dim: tl.constexpr,
    head_dim: tl.constexpr,
    back: tl.constexpr,
):
    """Columns from ``first`` on: float16 ``[padded_dim, columns]``, padded by zeros."""
    i = tl.arange(0, padded_dim)[:, None]
    j = first + tl.arange(0, columns)[None, :]
    offset = j * head_dim + i if back else i * head_dim + j
    if padded_dim == head_dim:
        return tl.load(signs + offset)
    else:
        return tl.load(signs + offset, (i < head_dim) & (j < head_dim), 0.0)
