"""What stands between a measurement and a speed-up: the float64 oracle.

Outputs are compared with `oscar_kv.core.attention` in float64: those over packed pages with what
the pages stand for (``packed.dense(torch.float64)``), those over BF16 states with these states. Of
a large batch the first and the last sequence are checked, of long sequences the first and the last
KV head with all its query heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from oscar_kv.core.attention import attention
from oscar_kv.storage.packed import PackedKV

TOLERANCE = 1e-2
"""Largest accepted ``|out - oracle| / |oracle|``; rounding the output to BF16 alone costs 2e-3."""

_LONG = 16384


def speed_up(baseline: float | None, ours: float, *errors: float | None) -> float | None:
    """How many times faster ``ours`` is, or ``None`` without proof that both are right.

    Args:
        baseline, ours: times in the same unit.
        errors: of everything that is compared, as measured in this run; ``None`` if it was not.
    """
    proven = all(error is not None and error <= TOLERANCE for error in errors)
    return baseline / ours if baseline and errors and proven else None


def relative_error(out: Tensor, expected: Tensor) -> float:
    """``|out - expected| / |expected|`` in float64; NaN if anything is NaN."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def packed_error(
    out: Tensor,
    query: Tensor,
    packed: PackedKV,
    new: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
) -> float:
    """The largest error of ``out``, attention over ``packed``.

    Args:
        new: exact keys and values of the newest tokens, where the queries saw these.
        starts: first visible position of each sequence.
    """
    errors = []
    for row in _rows(packed.batch_size):
        one = packed.to(packed.device)  # another view of the same pages, to select from
        one.select([row])
        keys, values = one.dense(torch.float64)
        if new is not None:
            for states, exact in zip((keys, values), new):
                states[:, :, -exact.shape[2] :] = exact[row].double()
        start = None if starts is None else starts[row : row + 1]
        errors += _errors(out[row], query[row], keys[0], values[0], start)
    return worst(errors)


def dense_error(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, *, causal: bool = True
) -> float:
    """The largest error of ``out``, attention over plain states of one length.

    Args:
        causal: bottom-right aligned; otherwise every query sees everything.
    """
    errors = []
    for row in _rows(query.shape[0]):
        errors += _errors(out[row], query[row], keys[row], values[row], causal=causal)
    return worst(errors)


def _rows(batch: int) -> list[int]:
    return sorted({0, batch - 1})


def _errors(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor | None = None,
    causal: bool = True,
) -> Iterator[float]:
    """Errors of one sequence, KV head by KV head (``[Hq, Tq, D]`` and ``[H, T, D]``)."""
    kv_heads, tokens = keys.shape[:2]
    group = query.shape[0] // kv_heads
    heads = range(kv_heads) if tokens <= _LONG else _rows(kv_heads)
    see_all = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    for head in heads:
        queries = slice(head * group, (head + 1) * group)
        expected = attention(
            query[None, queries].double(),
            keys[None, head : head + 1].double(),
            values[None, head : head + 1].double(),
            starts=start,
            mask=None if causal else see_all,
        )
        yield relative_error(out[None, queries], expected)


def worst(errors: Iterable[float]) -> float:
    """The largest, NaN above all."""
    return max(errors, key=lambda error: (error != error, error))
