"""Merges the parts of decode attention, and rotates the packed ones back."""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.kernels.triton_attend import BLIND, LOG2_E


@triton.jit
def _weighted_sum(
    sums, maxima, begin, end, largest, channel, there, page: tl.constexpr, chunk: tl.constexpr
):
    """The sum of parts ``begin .. end - 1`` of one row, by ``channel`` ``[a, b]``."""
    output = tl.zeros(channel.shape, tl.float32)
    for first in range(begin, end, chunk):
        part = first + tl.arange(0, chunk)
        maximum = tl.load(maxima + part * 2, mask=part < end, other=BLIND)
        # A part that saw nothing has written nothing.
        saw = (maximum > BLIND)[:, None, None] & there[None, :, :]
        offset = part[:, None, None] * page.value_dim + channel[None, :, :]
        numbers = tl.load(sums + offset, mask=saw, other=0.0)
        output += tl.sum(numbers * tl.exp2(maximum - largest)[:, None, None], 0)
    return output


@triton.jit(do_not_specialize=["parts", "page_splits", "num_queries"])
def combine_parts(
    sums,
    maxima,
    sink_logits,
    outer,
    inner,
    out,
    parts,
    page_splits,
    num_queries,
    page: tl.constexpr,
    group: tl.constexpr,
    outer_size: tl.constexpr,
    outer_padded: tl.constexpr,
    inner_size: tl.constexpr,
    parts_padded: tl.constexpr,
    chunk: tl.constexpr,
    has_sink_logits: tl.constexpr,
    early: tl.constexpr,
):
    """One row of the output: grid ``(B * H * rows,)``.

    Args:
        sums, maxima: what :func:`~oscar_kv.kernels.triton_decode.decode_part` wrote.
        sink_logits: ``[Hq]`` logits that join the normalizer, if there are any.
        outer, inner: float32 factors of the rotation of E channels, ``[a, a]`` and ``[b, b]``.
        out: ``[B, Hq, Tq, E]``, contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, outer_padded)
    b = tl.arange(0, inner_size)
    second = tl.load(inner + b[:, None] * inner_size + b[None, :])
    both = (a < outer_size)[:, None] & (a < outer_size)[None, :]
    first = tl.load(outer + a[:, None] * outer_size + a[None, :], mask=both, other=0.0)
    if early:  # everything from here on waits for the parts
        tl.extra.cuda.gdc_wait()
    maxima += row * parts * 2
    sums += row * parts * page.value_dim
    part = tl.arange(0, parts_padded)
    maximum = tl.load(maxima + part * 2, mask=part < parts, other=BLIND)
    normalizer = tl.load(maxima + part * 2 + 1, mask=part < parts, other=0.0)
    largest = tl.max(maximum, 0)
    added = 0.0
    if has_sink_logits:
        head = row // num_queries % (page.num_kv_heads * group)
        logit = tl.load(sink_logits + head).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, logit)
        added = tl.exp2(logit - largest)
    total = tl.sum(normalizer * tl.exp2(maximum - largest), 0) + added

    channel = a[:, None] * inner_size + b[None, :]
    there = (a < outer_size)[:, None] & (b < inner_size)[None, :]
    packed = _weighted_sum(sums, maxima, 0, page_splits, largest, channel, there, page, chunk)
    dense = _weighted_sum(sums, maxima, page_splits, parts, largest, channel, there, page, chunk)

    half = tl.sum(packed[:, None, :] * second[None, :, :], 2)
    dense += tl.sum(first[:, :, None] * half[None, :, :], 1)
    done = dense / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * page.value_dim + channel, done.to(out.dtype.element_ty), mask=there)
