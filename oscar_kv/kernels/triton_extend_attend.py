"""An online softmax of a block of rows over packed pages and over full-precision tokens.

Device functions of :mod:`~oscar_kv.kernels.triton_extend_kernel`. Rows are the first operand of the
matrix unit, tokens its columns; ``spec`` is an :class:`~oscar_kv.kernels.triton_extend.ExtendSpec`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oscar_kv.kernels.triton_attend import LOG2_E, capped
from oscar_kv.kernels.triton_page import PAGE
from oscar_kv.kernels.triton_tile import fetch_page, key_tile, tile_unit, value_tile

LOWEST = tl.constexpr(-3.0e38)
"""The maximum of nothing: finite, so that a row that has seen nothing yet has differences; below
any logit, also where a mask adds its dtype's lowest number."""


@triton.jit
def add_pages(
    state,
    rows,
    row_factor,
    logit_unit,
    pool,
    table,
    head,
    first,
    count,
    skip_at,
    skip,
    sinks,
    end,
    view,
    spec: tl.constexpr,
    edges: tl.constexpr,
):
    """Adds ``count`` pages from ``first`` on to ``state``, passing over ``skip`` of them where
    ``skip_at`` is reached. Where ``edges``, some of their tokens may be hidden from some rows."""
    page: tl.constexpr = spec.page
    total, maximum, normalizer, exponent = state
    if count > 0:
        # Loads run one page ahead, and block table entries two.
        last = count - 1
        following = tl.load(table + _page_index(0, first, skip_at, skip))
        fetched = fetch_page(pool, following, head, page)
        following = tl.load(table + _page_index(tl.minimum(1, last), first, skip_at, skip))
        for j in range(count):
            current = fetched
            fetched = fetch_page(pool, following, head, page)
            following = tl.load(table + _page_index(tl.minimum(j + 2, last), first, skip_at, skip))
            values = value_tile(current, page)
            keys = key_tile(current, page)
            logits = tl.dot(rows, tl.trans(keys))
            unit = tl.sum(current[4].to(tl.float32)[:, None], 1)  # as in _pairs
            unit *= logit_unit * tile_unit(page)
            logits = logits * unit[None, :]
            factor = row_factor
            if edges or spec.softcap is not None:
                logits = logits * row_factor[:, None]
                if spec.softcap is not None:
                    logits = capped(logits, spec.softcap)
                factor = tl.full([spec.block_rows], 1.0, tl.float32)
            if edges:
                position = sinks + _page_index(j, first, skip_at, skip) * PAGE
                position += tl.arange(0, PAGE)
                logits = _hide(logits, position, end, view, spec)
            grown = tl.maximum(maximum, tl.max(logits, 1) * factor)
            rescale = tl.exp2(maximum - grown)
            maximum = grown
            # The sums are in units of 2**exponent. A page has its own unit; the difference goes
            # into the weights as long as float16 can hold them, else the sums change theirs.
            own_exponent = current[5]
            kept = tl.minimum(tl.maximum(exponent, own_exponent - 12), own_exponent + 8)
            kept = tl.maximum(kept, exponent - 60)
            shift = (own_exponent - kept).to(tl.float32)
            if edges:  # near LOWEST a shift of the maximum would be lost
                weights = tl.exp2(logits - maximum[:, None] + shift)
            else:
                weights = tl.exp2(logits * factor[:, None] - (maximum - shift)[:, None])
            normalizer = normalizer * rescale + tl.sum(weights, 1) * tl.exp2(-shift)
            total *= (rescale * tl.exp2((exponent - kept).to(tl.float32)))[:, None]
            exponent = kept
            total = tl.dot(weights.to(tl.float16), tl.trans(values), total)
    return total, maximum, normalizer, exponent


@triton.jit
def _page_index(j, first, skip_at, skip):
    index = first + j
    return index + tl.where(index >= skip_at, skip, 0)


@triton.jit
def add_dense(
    state,
    rows,
    logit_unit,
    keys,
    values,
    slot,
    begin,
    end,
    low,
    high,
    view,
    spec: tl.constexpr,
):
    """Adds full-precision tokens at positions ``begin .. end - 1``; the first is token ``slot``
    of ``keys`` ``[tokens, D]`` and ``values`` ``[tokens, E]``."""
    total, maximum, normalizer = state
    page: tl.constexpr = spec.page
    channel = tl.arange(0, page.padded_head_dim)[None, :]
    column = tl.arange(0, page.padded_value_dim)[None, :]
    first = tl.maximum(low - begin, 0) // spec.block_tokens
    last = tl.cdiv(tl.minimum(high, end) - begin, spec.block_tokens)
    for j in range(first, last):
        token = j * spec.block_tokens + tl.arange(0, spec.block_tokens)
        inside = (token < end - begin)[:, None]
        k = tl.load(
            keys + (slot + token[:, None]) * page.head_dim + channel,
            inside & (channel < page.head_dim),
            0.0,
        )
        v = tl.load(
            values + (slot + token[:, None]) * page.value_dim + column,
            inside & (column < page.value_dim),
            0.0,
        )
        if spec.wide:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(rows.to(k.dtype), tl.trans(k), input_precision="ieee") * logit_unit
        if spec.softcap is not None:
            logits = capped(logits, spec.softcap)
        logits = _hide(logits, begin + token, end, view, spec)
        grown = tl.maximum(maximum, tl.max(logits, 1))
        rescale = tl.exp2(maximum - grown)
        maximum = grown
        weights = tl.exp2(logits - maximum[:, None])
        normalizer = normalizer * rescale + tl.sum(weights, 1)
        total = total * rescale[:, None]
        total = tl.dot(weights.to(v.dtype), v, total, input_precision="ieee")
    return total, maximum, normalizer


@triton.jit
def _hide(logits, position, end, view, spec: tl.constexpr):
    """-inf for positions from ``end`` on and those that a row may not see."""
    own, start, mask, mask_rows, mask_stride = view
    position = position[None, :]
    seen = position < end
    if mask is None:
        seen = seen & (position <= own[:, None]) & (position >= start)
    else:
        entry = tl.load(mask + mask_rows[:, None] + position * mask_stride, seen, 0)
        if mask.dtype.element_ty == tl.uint8:
            seen = seen & (entry != 0)
        else:
            # A mask's lowest finite number stays one: it does not hide, it outweighs.
            bias = tl.maximum(entry.to(tl.float32), LOWEST / 1.5) * LOG2_E
            logits += tl.where(entry == float("-inf"), float("-inf"), bias)
    if spec.window is not None:
        seen = seen & (position > own[:, None] - spec.window)
    return tl.where(seen, logits, float("-inf"))
