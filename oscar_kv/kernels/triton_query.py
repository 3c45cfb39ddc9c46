# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# (a tuple that grows in an unrolled loop is not the empty one it began as)
"""The rotated queries of a decode step as operands of the matrix unit, made inside the kernel.

A head_dim that is a power of two has the rotation ``H_{D/16} x H_16 / sqrt(D)``: one product with
``H_16`` per 16 channels, and butterflies between these. That costs a program a fraction of a page
and saves a launch. Other head sizes come rotated (``triton_rotate``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.kernels.triton_page import TOKENS


@triton.jit
def query_segments(query, rotated, rotated_factor, rows, page: tl.constexpr):
    """N rotated queries in the segments in which keys are taken.

    Args:
        query: pointer to ``[rows, D]``; ``rotated``, ``rotated_factor``: what
            :func:`~oscar_kv.kernels.triton_rotate.rotate_queries` returns, where it is needed.
        rows: int ``[N]``.

    Returns:
        Tuple of float16 ``[width, N]``, and the float32 ``[N]`` they have to be multiplied by.
    """
    count: tl.constexpr = page.segments
    first = (rows.to(tl.int64) * page.head_dim)[None, :]
    segments = ()
    if page.rotates_in_kernel:
        blocks, factor = _rotated(query + first, page.head_dim // TOKENS)
        for j in tl.static_range(count):
            segments = segments + (
                _stack(blocks, page.segment_begin(j) // TOKENS, page.segment_width(j) // TOKENS),
            )
    else:
        for j in tl.static_range(count):
            channel = tl.arange(0, page.segment_width(j)) + page.segment_begin(j)
            segments = segments + (tl.load(rotated + first + channel[:, None]),)
        factor = tl.load(rotated_factor + rows)
    return segments, factor


@triton.jit
def _rotated(rows, blocks: tl.constexpr):
    """Rotates ``16 * blocks`` channels of N query rows; ``blocks`` is a power of two.

    Args:
        rows: pointers ``[1, N]`` to the rows, last dimension contiguous.

    Returns:
        Tuple of float16 ``[16, N]``, and the float32 ``[N]`` they have to be multiplied by.
    """
    row = tl.arange(0, TOKENS)
    largest = tl.zeros([rows.shape[1]], tl.float32)
    parts = ()
    for block in tl.static_range(blocks):
        part = tl.load(rows + (row + block * TOKENS)[:, None]).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(part), 0))
        parts = parts + (part,)
    # A power of two, so that dividing by it is exact: 16-bit queries stay as they are.
    bits = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    unit = bits.to(tl.float32, bitcast=True)
    parity = row[:, None] & row[None, :]
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    hadamard = (1 - 2 * parity).to(tl.float16)
    rotated = ()
    for block in tl.static_range(blocks):
        part = (parts[block] * (1.0 / unit)[None, :]).to(tl.float16)
        rotated = rotated + (tl.dot(hadamard, part),)
    for bit in tl.static_range(4):
        if 1 << bit < blocks:
            mixed = ()
            for block in tl.static_range(blocks):
                if block >> bit & 1:
                    mixed = mixed + (rotated[block ^ (1 << bit)] - rotated[block],)
                else:
                    mixed = mixed + (rotated[block] + rotated[block ^ (1 << bit)],)
            rotated = mixed
    halves = ()
    for block in tl.static_range(blocks):
        halves = halves + ((rotated[block] * (16 * blocks) ** -0.5).to(tl.float16),)
    return halves, unit


@triton.jit
def _stack(blocks, first: tl.constexpr, count: tl.constexpr):
    """``count`` of ``blocks``, tensors ``[16, N]``, from ``first`` on: one ``[16 * count, N]``."""
    columns: tl.constexpr = blocks[0].shape[1]
    parts = ()
    for i in tl.static_range(count):
        parts = parts + (blocks[first + i],)
    for level in tl.static_range(4):
        if 1 << level < count:
            pairs = ()
            for i in tl.static_range(count >> level + 1):
                pairs = pairs + (tl.join(parts[2 * i], parts[2 * i + 1]),)
            parts = pairs
    # Each join has added a dimension at the end: a bit of the block's number, lowest first.
    if count == 2:
        whole = tl.permute(parts[0], (2, 0, 1))
    elif count == 4:
        whole = tl.permute(parts[0], (3, 2, 0, 1))
    elif count == 8:
        whole = tl.permute(parts[0], (4, 3, 2, 0, 1))
    elif count == 16:
        whole = tl.permute(parts[0], (5, 4, 3, 2, 0, 1))
    else:
        tl.static_assert(count == 1)
        whole = parts[0]
    whole = tl.reshape(whole, (count * TOKENS, columns))
    # A gather of everything has the layout of its index: channels along the lanes, as key metadata
    # comes. Without it the compiler would rearrange the metadata of every page instead.
    channel = tl.arange(0, count * TOKENS)[:, None]
    return tl.gather(whole, tl.broadcast_to(channel, (count * TOKENS, columns)), 0)
