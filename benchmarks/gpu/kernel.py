"""Decode attention over packed pages against the best attention over BF16 keys and values.

    oscar-kv bench kernel [--quick]

A row is one call ``decode_attention(query, packed)`` with one new token per sequence: rotation of
query and output, pages, tail and combining included. Everything about how it is timed is in
`timing.py`, what it is compared with in `baselines.py`; a speed-up is given only where both
outputs agree with the float64 oracle (`oracle.py`). ``TB/s`` counts the bytes of pages and tail in
use, once. The last rows are `append`: what a decode step pays to store a token.

Kinds of rows: ``uniform``; ``ragged``, lengths uniform in [T/2, T], compared with the split-K
kernel over the same lengths, and with ourselves over equally many tokens in uniform lengths;
``padded``, left padding of up to T/4, compared with BF16 without padding; ``model``, states with
the outlier channels and norms of a model.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor

from benchmarks.gpu import append, baselines, oracle
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.states import bytes_read, config_of, dense_copies, packed_copies, random_states
from benchmarks.gpu.timing import (
    Budget,
    Timing,
    ceilings,
    device,
    require_gpu,
    time_calls,
)
from oscar_kv import decode_attention
from oscar_kv.kernels.dispatch import choose
from oscar_kv.storage.packed import PackedKV


class Target(NamedTuple):
    """Microseconds that the design sets for a shape.

    32/8 heads of 128, no recent window, and without the rotation of query and output, which the
    rows here include.
    """

    best_bf16: float
    prototype: float
    must: float
    stretch: float


K = 1024
TARGETS = {
    (1, 1 * K): Target(5.7, 5.7, 6.3, 5.5),
    (1, 4 * K): Target(9.7, 6.7, 7.4, 6.0),
    (1, 16 * K): Target(21.8, 10.3, 11.3, 8.5),
    (1, 32 * K): Target(37.4, 14.2, 15.6, 11.0),
    (1, 128 * K): Target(125.6, 34.3, 38.0, 28.0),
    (8, 4 * K): Target(37.4, 14.1, 15.5, 11.5),
    (32, 4 * K): Target(127.2, 34.4, 38.0, 30.0),
    (8, 32 * K): Target(246.5, 60.3, 66.0, 52.0),
    (8, 128 * K): Target(948.0, 192.6, 212.0, 175.0),
}
"""By (batch, context), as measured or set on an H200 before this repository had GPU kernels."""


@dataclass(frozen=True)
class Shape:
    """What keys, values and queries are shaped like."""

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        name = f"{self.batch}x{tokens(self.context)}"
        usual = (self.heads, self.kv_heads, self.head_dim) == (32, 8, 128)
        return name if usual else f"{name} {self.heads}/{self.kv_heads}x{self.head_dim}"

    @property
    def target(self) -> Target | None:
        """The design's figures, where it has some."""
        usual = (self.heads, self.kv_heads, self.head_dim) == (32, 8, 128)
        return TARGETS.get((self.batch, self.context)) if usual else None


@dataclass(frozen=True)
class Variant:
    """What is measured on a shape."""

    preset: str = "compact"
    recent_tokens: int | None = None
    """Instead of the preset's."""
    kind: str = "uniform"

    def __str__(self) -> str:
        window = "" if self.recent_tokens is None else f", recent {self.recent_tokens}"
        return f"{self.preset}{window}, {self.kind}"


COMPACT = Variant()
NO_WINDOW = Variant(recent_tokens=0)
PRESETS = (Variant("quality"), Variant("paper"), Variant("high"))
RAGGED, PADDED, MODEL = (Variant(kind=kind) for kind in ("ragged", "padded", "model"))


def plan(quick: bool) -> list[tuple[Shape, Variant]]:
    """What to measure, the most important first; another preset costs a compilation first."""

    def rows(shapes: Iterable[Shape], *variants: Variant) -> list[tuple[Shape, Variant]]:
        return [(shape, variant) for shape in shapes for variant in variants]

    if quick:
        return [
            *rows([Shape(1, c * K) for c in (1, 4, 32, 128)], COMPACT, NO_WINDOW),
            *rows([Shape(8, 4 * K)], COMPACT, NO_WINDOW, RAGGED),
            *rows([Shape(8, 32 * K)], COMPACT, NO_WINDOW),
        ]
    long = Shape(8, 32 * K)
    return [
        *rows([Shape(*key) for key in TARGETS], COMPACT, NO_WINDOW),
        *rows([long], RAGGED, PADDED, MODEL),
        *rows([Shape(8, 4 * K)], RAGGED, MODEL),
        *rows([long, Shape(1, 32 * K)], *PRESETS),
        *rows([Shape(b, c * K, heads=64) for b, c in ((1, 4), (1, 32), (8, 32))], COMPACT),
        *rows([Shape(b, c * K, head_dim=64) for b, c in ((1, 4), (1, 32), (8, 32))], COMPACT),
        *rows([Shape(1, 256 * K)], COMPACT, NO_WINDOW),
        *rows([Shape(b, c * K) for b, c in ((8, 1), (32, 1), (4, 16), (32, 32))], COMPACT),
        *rows([Shape(1, 4 * K)], *PRESETS),
    ]


@dataclass(frozen=True)
class Prepared:
    """Random states of one shape, and what the baselines took on them."""

    query: Tensor
    keys: Tensor
    values: Tensor
    found: baselines.Found


@lru_cache(maxsize=1)
def prepare(shape: Shape, dtype: torch.dtype) -> Prepared:
    """Measures the baselines of a shape, once for all its variants."""
    where = device()
    query = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, device=where, dtype=dtype)
    size = (shape.batch, shape.kv_heads, shape.context, shape.head_dim)
    keys, values = random_states(size, where, dtype)
    found = baselines.decode(query, dense_copies(keys, values))
    return Prepared(query, keys, values, found)


def measure(
    shape: Shape,
    variant: Variant,
    ceiling: dict[str, float],
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """The row of one variant of a shape."""
    prepared = prepare(shape, dtype)
    query, keys, values = prepared.query, prepared.keys, prepared.values
    if variant.kind == "model":
        keys, values = random_states(keys.shape, keys.device, dtype, "model")
    config = config_of(variant.preset, variant.recent_tokens)
    lengths = starts = None
    if variant.kind == "ragged":
        lengths = _ragged(shape)
    elif variant.kind == "padded":
        most = shape.context // 4
        starts = torch.randint(most, (shape.batch,), device=keys.device, dtype=torch.int32)
    copies = packed_copies(keys, values, config, lengths)
    timing = _time(query, copies, starts)
    row = {
        "case": str(shape),
        "variant": str(variant),
        **vars(shape),
        **vars(variant),
        "recent_tokens": config.recent_tokens,
        "backend": choose(copies[0].layout, keys.device)[0].name,
        "copies": len(copies),
        **timing.row(),
        **timing.bandwidth(bytes_read(copies[0]), ceiling),
        "oracle_error": oracle.packed_error(timing.output, query, copies[0], starts=starts),
        **prepared.found.row(),
    }
    if lengths is not None:
        row |= _ragged_row(query, keys, values, lengths)
        mean = sum(lengths) // len(lengths)
        even = packed_copies(keys[:, :, :mean], values[:, :, :mean], config)
        row["us_uniform_lengths"] = _time(query, even).p50
    row["speed_up"] = oracle.speed_up(
        row["best_bf16_us"], timing.p50, row["oracle_error"], row["best_bf16_error"]
    )
    if shape.target is not None and variant.preset == "compact":
        row["target"] = shape.target._asdict()
    yield row


def _time(query: Tensor, copies: Sequence[PackedKV], starts: Tensor | None = None) -> Timing:
    calls = [lambda c=c: decode_attention(query, c, starts=starts) for c in copies]
    return time_calls(calls, bytes_read(copies[0]))


def _ragged(shape: Shape) -> list[int]:
    """Lengths uniform in [T/2, T], the same in every run; the longest is T."""
    draw = random.Random(0)
    shorter = [draw.randint(shape.context // 2, shape.context) for _ in range(shape.batch - 1)]
    return [shape.context, *shorter]


def _ragged_row(query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Row:
    """BF16 over the same lengths: the split-K kernel, which reads them on the device."""
    on_device = torch.tensor(lengths, dtype=torch.int32, device=query.device)
    copies = dense_copies(keys, values)
    launch = baselines.tuned(query, copies, on_device)
    timing = baselines.split_k(launch, on_device, query, copies)
    errors = [
        oracle.dense_error(
            timing.output[r : r + 1],
            query[r : r + 1],
            keys[r : r + 1, :, : lengths[r]],
            values[r : r + 1, :, : lengths[r]],
        )
        for r in (0, len(lengths) - 1)
    ]
    return {
        "best_bf16": baselines.SPLIT_K,
        "split_k_launch": str(launch),
        "best_bf16_us": timing.p50,
        "best_bf16_error": oracle.worst(errors),
        "bf16_us": {},
        "bf16_refused": {},
    }


def tokens(count: int) -> str:
    """``4096`` as ``4K``."""
    return f"{count // K}K" if count % K == 0 else str(count)


COLUMNS = {
    "batch x context": (-18, lambda row: row["case"]),
    "variant": (-30, lambda row: row["variant"]),
    "us": (8, lambda row: row["us_p50"]),
    "TB/s": (6, lambda row: row.get("tb_s")),
    "of copy": (7, lambda row: row.get("of_copy")),
    "BF16 us": (8, lambda row: row.get("best_bf16_us")),
    "speed-up": (8, lambda row: row.get("speed_up")),
    "must": (6, lambda row: row.get("target", {}).get("must")),
    "stretch": (7, lambda row: row.get("target", {}).get("stretch")),
    "error": (8, lambda row: row["oracle_error"]),
    "best BF16": (-20, lambda row: row.get("best_bf16")),
}


def main(
    quick: bool = typer.Option(False, help="The most important third."),
    seconds: float = typer.Option(0.0, help="Begin nothing after so long; 0 is 140, or 45 quick."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON and nothing else."),
) -> None:
    """Measures, checks, prints and records."""
    require_gpu()
    warnings.filterwarnings("ignore", category=UserWarning)  # why SDPA passes a kernel over
    torch.manual_seed(0)
    budget = Budget(seconds or (45.0 if quick else 140.0))
    ceiling = ceilings()
    settings: dict[str, Any] = {"dtype": "bfloat16", "new_tokens": 1, "quick": quick, **ceiling}
    report = Report("gpu_kernel", settings, COLUMNS, as_json)
    work: dict[str, Callable[[], Iterable[Row]]] = {}
    planned = {f"{s} {v}": partial(measure, s, v, ceiling) for s, v in plan(quick)}
    appends = {f"append, {b}": partial(append.rows, "compact", b) for b in (1, 32)}
    main_table = 2 * len(TARGETS)
    names = list(planned)
    for name in (*names[:main_table], *appends, *names[main_table:]):
        work[name] = planned.get(name) or appends[name]
    for name, measurement in budget.within(work):
        report.attempt(name, measurement)
    report.close(budget.skipped)


if __name__ == "__main__":
    typer.run(main)
