# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# (a tuple that grows in an unrolled loop is not the empty one it began as)
"""Attention over packed pages and over full-precision tokens, for a few queries, in Triton.

Device functions of :mod:`~oscar_kv.kernels.triton_decode`. Codes are the 16-row operand of the
matrix unit, the query rows of one KV head its columns:

    logits[16 tokens, columns] = codes[16 tokens, D] @ (query * scale)[D, columns]
    output[16 channels, columns] += codes[16 channels, 16 tokens] @ weights[16 tokens, columns]

A code is never converted: masked in place it is a float16 number (:func:`triton_page.plane`). The
key grid is folded into the query, token scales into the logits, the value grid into the weights;
the constant terms are short dot products. Everything is unrolled over the eight planes of a page.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.kernels.triton_page import (
    CODE_UNIT,
    NUM_PLANES,
    PAGE,
    TOKENS,
    high_planes,
    key_metadata,
    page_pointer,
    plane,
    token_scales,
    value_grids,
)

BLIND = tl.constexpr(-1.0e20)
"""The maximum of nothing: far below any logit, and exp2 of the difference is zero."""
WEIGHT_UNIT = tl.constexpr(64.0)
"""Brings weights times value scales, at most 448, to where float16 has its full precision."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def page_logits(base, first, head, query, page: tl.constexpr):
    """Logits of one page without the factor of each query: eight float32 ``[16, N]``, by plane.

    Args:
        base: pointer to the page of this head; ``first``: to that of head 0.
        query: the rotated query, float16 ``[width, N]`` per segment of channels.
    """
    groups: tl.constexpr = page.key_groups
    segments: tl.constexpr = page.segments
    sets: tl.constexpr = page.key_bits // 2
    row = tl.arange(0, TOKENS)
    scaled = ()
    constant = ()
    for g in tl.static_range(groups):
        total = tl.zeros([TOKENS, query[0].shape[1]], tl.float32)
        for j in tl.static_range(segments):
            entry = g * page.head_dim
            scale = key_metadata(base, entry + page.key_entry(0, j), page.segment_width(j), page)
            centre = key_metadata(base, entry + page.key_entry(1, j), page.segment_width(j), page)
            folded = query[j] * scale[:, None]
            rest = query[j] * centre[:, None] - folded * page.key_middle
            ones = tl.full([TOKENS, page.segment_width(j)], 1.0, tl.float16)
            total = tl.dot(ones, rest, total)
            scaled = scaled + (folded,)
        constant = constant + (total,)
    # Each plane starts from the constant term, in the unit that its masked codes have.
    logits = ()
    for p in tl.static_range(NUM_PLANES):
        logits = logits + (constant[p * groups // NUM_PLANES] * (4 ** (p % 4) / CODE_UNIT),)
    for s in tl.static_range(sets):
        for j in tl.static_range(segments):
            channel = tl.arange(0, page.segment_width(j))[None, :]
            codes = base.to(tl.pointer_type(tl.int16)) + (row[:, None] * page.head_dim + channel)
            first_code = page.key_codes // 2 + s * TOKENS * page.head_dim + page.segment_begin(j)
            low = tl.load(codes + first_code)
            high = high_planes(low)
            added = ()
            for p in tl.static_range(NUM_PLANES):
                right = scaled[p * groups // NUM_PLANES * segments + j]
                if s == 1:
                    right = right * 4.0
                added = added + (tl.dot(plane(low, high, p), right, logits[p]),)
            logits = added
    scales = token_scales(first, head, page)
    out = ()
    for p in tl.static_range(NUM_PLANES):
        out = out + (logits[p] * (scales[p] * (CODE_UNIT / 4 ** (p % 4)))[:, None],)
    return out


@triton.jit
def unit_exponent(base, page: tl.constexpr):
    """The exponent of the power of two that multiplies the value grid of a page.

    It joins the online softmax, so that weights times scales fit float16 whatever the values'
    magnitude.
    """
    unit = tl.load((base + page.value_unit).to(tl.pointer_type(tl.int32)))
    return (unit >> 23) - 127


@triton.jit
def power_of_two(exponent):
    """``2**exponent`` of an int32 in -126..127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_values(base, exponentials, output, constant, page: tl.constexpr):
    """Adds the values of one page.

    Args:
        exponentials: eight float32 ``[16, N]``, by plane.
        output: float32 ``[16 channels, N]`` per block of channels; its codes still masked in place.
        constant: float32 ``[16 tokens, N]`` per value group, the part without codes.

    Returns:
        The new ``output`` and ``constant``.
    """
    groups: tl.constexpr = page.value_groups
    blocks: tl.constexpr = page.value_blocks
    sets: tl.constexpr = page.value_bits // 2
    row = tl.arange(0, TOKENS)
    codes = base.to(tl.pointer_type(tl.int16)) + (row[:, None] * TOKENS + row[None, :])
    weights = ()
    constants = ()
    for g in tl.static_range(groups):
        total = constant[g]
        scales, centres = value_grids(base, g, page)
        for p in tl.static_range(NUM_PLANES):
            total += exponentials[p] * (centres[p] - scales[p] * page.value_middle)[:, None]
            weight = exponentials[p] * (scales[p] * (WEIGHT_UNIT / 4 ** (p % 4)))[:, None]
            weights = weights + (weight.to(tl.float16),)
        constants = constants + (total,)
    outputs = ()
    for block in tl.static_range(blocks):
        added = output[block]
        for s in tl.static_range(sets):
            tile = (s * page.value_blocks + block) * TOKENS * TOKENS
            low = tl.load(codes + (page.value_codes // 2 + tile))
            for g in tl.static_range(groups):
                if page.group_in_block(g, block):
                    part = low
                    if page.block_is_split(block):
                        mine = (row + block * TOKENS) // page.value_group == g
                        part = tl.where(mine[:, None], low, 0).to(tl.int16)
                    high = high_planes(part)
                    for p in tl.static_range(NUM_PLANES):
                        right = weights[g * NUM_PLANES + p]
                        if s == 1:
                            right = right * 4.0
                        added = tl.dot(plane(part, high, p), right, added)
        outputs = outputs + (added,)
    return outputs, constants


@triton.jit
def hidden(
    position, own, start, limit, window, mask, mask_kind: tl.constexpr, has_window: tl.constexpr
):
    """What is added to logits in base 2: 0 where a token is seen, -inf where not.

    Args:
        position: int32 ``[T, 1]``.
        own: int32 ``[1, N]``, positions of the queries; ``[1, 1]`` where all see the same.
        start: the first visible position; ``limit``: the first that is not.
        mask: pointers shaped as `own` to each query's row of a mask, which replaces causality.
        mask_kind: 0 no mask, 1 bool, 2 additive.
    """
    seen = (position >= start) & (position < limit)
    if has_window:
        seen = seen & (position > own - window)
    if mask_kind == 0:
        return tl.where(seen & (position <= own), 0.0, float("-inf"))
    else:
        numbers = tl.load(mask + position, mask=seen, other=0)
        if mask_kind == 1:
            return tl.where(seen & (numbers != 0), 0.0, float("-inf"))
        else:
            return tl.where(seen, numbers.to(tl.float32) * LOG2_E, float("-inf"))


@triton.jit
def capped(logits, softcap):
    """``softcap * tanh(logits / softcap)`` of logits in base 2."""
    cap = softcap * LOG2_E
    return cap - 2.0 * cap / (tl.exp2(2.0 / softcap * logits) + 1.0)


@triton.jit
def online_weights(logits, maximum, factor, bias):
    """One step of an online softmax in base 2.

    Args:
        logits: tuple of float32 ``[T, N]``, to be multiplied by ``factor`` ``[N]``, positive.
        maximum: float32 ``[N]``, so far.
        bias: float32 scalar added to all logits.

    Returns:
        The exponentials relative to the new maximum, that, and the factor for earlier sums.
    """
    largest = logits[0]
    for i in tl.static_range(1, len(logits)):
        largest = tl.maximum(largest, logits[i])
    new = tl.maximum(maximum, tl.max(largest, 0) * factor + bias)
    base = new - bias
    exponentials = ()
    for i in tl.static_range(len(logits)):
        exponentials = exponentials + (tl.exp2(logits[i] * factor[None, :] - base[None, :]),)
    return exponentials, new, tl.exp2(maximum - new)


@triton.jit
def attend_pages(
    pool,
    table,
    begin,
    end,
    head,
    query,
    factor,
    first_position,
    own,
    start,
    limit,
    window,
    mask,
    softcap,
    page: tl.constexpr,
    page_mask: tl.constexpr,
    mask_kind: tl.constexpr,
    has_window: tl.constexpr,
    has_softcap: tl.constexpr,
    stages: tl.constexpr,
):
    """Attends over pages ``begin .. end - 1`` (at least one) of a sequence.

    Args:
        table: pointer to the sequence's page ids.
        query: rotated query, see :func:`page_logits`; ``factor``: float32 ``[N]``, with scaling.
        first_position: of page 0.
        own .. mask_kind: as in :func:`hidden`, unless ``page_mask`` is 0.

    Returns:
        Tuple of float32 ``[16, N]`` sums by block of channels, the maximum ``[N]`` and the
        normalizer ``[N]``.
    """
    groups: tl.constexpr = page.value_groups
    blocks: tl.constexpr = page.value_blocks
    columns: tl.constexpr = query[0].shape[1]
    row = tl.arange(0, TOKENS)
    maximum = tl.full([columns], BLIND, tl.float32)
    normalizer = tl.zeros([TOKENS, columns], tl.float32)
    output = ()
    for _ in tl.static_range(blocks):
        output = output + (tl.zeros([TOKENS, columns], tl.float32),)
    constant = ()
    for _ in tl.static_range(groups):
        constant = constant + (tl.zeros([TOKENS, columns], tl.float32),)
    # Ids of pages are loaded two pages ahead: the loads of a page wait for its id.
    current = tl.load(table + begin)
    following = tl.load(table + tl.minimum(begin + 1, end - 1))
    exponent = unit_exponent(page_pointer(pool, current, head, page), page)
    for i in tl.range(begin, end, num_stages=stages):
        later = tl.load(table + tl.minimum(i + 2, end - 1))
        shared = page_pointer(pool, current, 0, page)
        base = shared + head * page.page_bytes
        logits = page_logits(base, shared, head, query, page)
        scale = factor
        if has_softcap or mask_kind == 2:
            whole = ()
            for p in tl.static_range(NUM_PLANES):
                one = logits[p] * factor[None, :]
                if has_softcap:
                    one = capped(one, softcap)
                whole = whole + (one,)
            logits = whole
            scale = tl.full([columns], 1.0, tl.float32)
        if page_mask:
            masked = ()
            for p in tl.static_range(NUM_PLANES):
                position = (row + (first_position + i * PAGE + p * TOKENS))[:, None]
                added = hidden(position, own, start, limit, window, mask, mask_kind, has_window)
                masked = masked + (logits[p] + added,)
            logits = masked
        weights, maximum, rescale = online_weights(logits, maximum, scale, exponent.to(tl.float32))
        normalizer = normalizer * rescale[None, :]
        share = power_of_two(-exponent)
        for p in tl.static_range(NUM_PLANES):
            normalizer += weights[p] * share
        shrunk = ()
        for b in tl.static_range(blocks):
            shrunk = shrunk + (output[b] * rescale[None, :],)
        shrunk_constant = ()
        for g in tl.static_range(groups):
            shrunk_constant = shrunk_constant + (constant[g] * rescale[None, :],)
        output, constant = add_values(base, weights, shrunk, shrunk_constant, page)
        # Not a plain assignment: the compiler does not pipeline loops that hand on what they got.
        current = tl.maximum(following, 0)
        following = later
        exponent = unit_exponent(page_pointer(pool, current, head, page), page)
    finished = ()
    for b in tl.static_range(blocks):
        done = output[b] * (CODE_UNIT / WEIGHT_UNIT)
        for g in tl.static_range(groups):
            if page.group_in_block(g, b):
                whole = tl.sum(constant[g], 0)[None, :]
                if page.block_is_split(b):
                    mine = (row + b * TOKENS) // page.value_group == g
                    whole = tl.where(mine[:, None], whole, 0.0)
                done += whole
        finished = finished + (done,)
    return finished, maximum, tl.sum(normalizer, 0)


@triton.jit
def attend_dense(
    keys,
    values,
    count,
    query,
    scaling,
    first_position,
    own,
    start,
    limit,
    window,
    mask,
    softcap,
    page: tl.constexpr,
    tokens: tl.constexpr,
    mask_kind: tl.constexpr,
    has_window: tl.constexpr,
    has_softcap: tl.constexpr,
):
    """Attends over one block of full-precision tokens.

    Args:
        keys, values: pointers to the first token.
        count: tokens that there are, at most ``tokens``.
        query: ``[padded D, N]``, unrotated, in the dtype of the keys.

    Returns:
        float32 ``[padded E, N]`` sums in the original basis, maximum ``[N]``, normalizer ``[N]``.
    """
    token = tl.arange(0, tokens)
    channel = tl.arange(0, query.shape[0])
    value_channel = tl.arange(0, page.padded_value_dim)
    there = (token < count)[:, None]
    key = tl.load(
        keys + token[:, None] * page.head_dim + channel[None, :],
        mask=there & (channel < page.head_dim)[None, :],
        other=0.0,
    )
    value = tl.load(
        values + token[:, None] * page.value_dim + value_channel[None, :],
        mask=there & (value_channel < page.value_dim)[None, :],
        other=0.0,
    )
    logits = tl.dot(key, query, input_precision="ieee") * (scaling * LOG2_E)
    if has_softcap:
        logits = capped(logits, softcap)
    position = (first_position + token)[:, None]
    end = tl.minimum(limit, first_position + count)
    logits += hidden(position, own, start, end, window, mask, mask_kind, has_window)
    maximum = tl.maximum(tl.max(logits, 0), BLIND)
    weights = tl.exp2(logits - maximum[None, :])
    output = tl.dot(tl.trans(value), weights.to(value.dtype), input_precision="ieee")
    return output, maximum, tl.sum(weights, 0)
