"""Prompts: packing them, and attending from many new tokens over a packed prefix.

    oscar-kv bench prefill [--quick]

``pack`` rows: 32K tokens of 8 KV heads, and what that adds to the layer they come from: the GEMMs
and the causal attention of an 8B-shaped BF16 layer over as many tokens. The floor is the states
read and the pages written at the measured copy bandwidth.

``extend`` rows: ``extend_attention`` of new tokens over a packed prefix against PyTorch's kernels
over the same prefix in BF16, aligned as `baselines.py` says. A speed-up is given only where both
outputs agree with the float64 oracle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.gpu import baselines, oracle
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.states import bytes_read, config_of, dense_copies, packed_copies, random_states
from benchmarks.gpu.timing import (
    Budget,
    ceilings,
    device,
    require_gpu,
    time_calls,
)
from oscar_kv.config import PAGE_TOKENS
from oscar_kv.kernels import extend_attention, pack, unpack
from oscar_kv.kernels.dispatch import choose
from oscar_kv.storage.codec import encode_pages as reference_pack
from oscar_kv.storage.layout import PageLayout

K = 1024
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN, INTERMEDIATE = 4096, 14336
DTYPE = torch.bfloat16
ONE_CALL = 1 << 33
"""For what runs for milliseconds: one call per graph."""


def layer_microseconds(tokens: int) -> dict[str, float]:
    """Prefill of one BF16 layer: its matrix products, and causal attention by the best kernel."""
    where = device()
    states = torch.randn(tokens, HIDDEN, device=where, dtype=DTYPE)
    wide = torch.randn(tokens, INTERMEDIATE, device=where, dtype=DTYPE)
    shapes = {
        "query and output": (HIDDEN, HIDDEN, 2),
        "key and value": (HIDDEN, KV_HEADS * HEAD_DIM, 2),
        "gate and up": (HIDDEN, INTERMEDIATE, 2),
        "down": (INTERMEDIATE, HIDDEN, 1),
    }
    products = 0.0
    for rows, columns, count in shapes.values():
        weight = torch.randn(rows, columns, device=where, dtype=DTYPE)
        given = wide if rows == INTERMEDIATE else states
        product = partial(torch.mm, given, weight)
        products += count * time_calls([product], ONE_CALL, replays=5).p50
    query = torch.randn(1, HEADS, tokens, HEAD_DIM, device=where, dtype=DTYPE)
    keys, values = random_states((1, KV_HEADS, tokens, HEAD_DIM), where, DTYPE)
    attention = {}
    for name, backend in baselines.SDPA.items():

        def call(backend: Any = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, keys, values, is_causal=True, enable_gqa=True
                )

        try:
            attention[name] = time_calls([call], ONE_CALL, replays=5).p50
        except RuntimeError:  # this kernel does not take grouped heads
            continue
    return {"gemm_us": products, "attention_us": min(attention.values())}


def pack_rows(
    preset: str, tokens: int, ceiling: dict[str, float], layer: dict[str, float]
) -> Iterator[Row]:
    """The fused packing kernel on ``tokens`` tokens of one sequence."""
    where = device()
    layout = PageLayout(config_of(preset), HEAD_DIM, KV_HEADS)
    size = (tokens // PAGE_TOKENS, KV_HEADS, PAGE_TOKENS, HEAD_DIM)
    keys, values = random_states(size, where, DTYPE)
    read = keys.nbytes + values.nbytes
    copies = dense_copies(keys, values)
    nbytes = read + size[0] * KV_HEADS * layout.page_bytes
    timing = time_calls([partial(pack, k, v, layout) for k, v in copies], nbytes)
    sample = (keys[:4], values[:4])
    ours = _restored_error(timing.output[:4], sample, layout)
    reference = _restored_error(reference_pack(*sample, layout), sample, layout)
    proven = abs(ours / reference - 1) <= oracle.TOLERANCE
    yield {
        "case": f"pack {tokens // K}K, {preset}",
        "preset": preset,
        "tokens": tokens,
        "backend": choose(layout, where)[0].name,
        **timing.row(),
        **timing.bandwidth(nbytes, ceiling),
        "floor_us": nbytes / ceiling["copy_tb_s"] / 1e6,
        "layer": layer,
        "share_of_layer": timing.p50 / sum(layer.values()) if proven else None,
        "restored_error": ours,
        "restored_error_reference": reference,
        "oracle_error": abs(ours / reference - 1),
    }


def _restored_error(pages: Tensor, states: tuple[Tensor, Tensor], layout: PageLayout) -> float:
    """Error of what pages stand for against what was packed, in float64."""
    errors = zip(unpack(pages, layout, torch.float64), states)
    return sum(oracle.relative_error(a, b) for a, b in errors)


def extend_rows(preset: str, new: int, prefix: int, ceiling: dict[str, float]) -> Iterator[Row]:
    """``new`` tokens attending over ``prefix`` packed ones and over themselves."""
    where = device()
    query = torch.randn(1, HEADS, new, HEAD_DIM, device=where, dtype=DTYPE)
    size = (1, KV_HEADS, prefix + new, HEAD_DIM)
    keys, values = random_states(size, where, DTYPE)
    found = baselines.extend(query, dense_copies(keys, values))
    copies = packed_copies(keys, values, config_of(preset))
    fresh = (keys[:, :, -new:].contiguous(), values[:, :, -new:].contiguous())
    calls = [partial(extend_attention, query, packed, *fresh) for packed in copies]
    timing = time_calls(calls, keys.nbytes + values.nbytes)
    error = oracle.packed_error(timing.output, query, copies[0], fresh)
    best = found.row()
    yield {
        "case": f"extend {new} over {prefix // K}K, {preset}",
        "preset": preset,
        "new_tokens": new,
        "prefix": prefix,
        "backend": choose(copies[0].layout, where)[0].name,
        **timing.row(),
        **timing.bandwidth(bytes_read(copies[0]), ceiling),
        "tflops": 4 * new * (prefix + new / 2) * HEADS * HEAD_DIM / timing.p50 / 1e6,
        "oracle_error": error,
        **best,
        "speed_up": oracle.speed_up(
            best["best_bf16_us"], timing.p50, error, best["best_bf16_error"]
        ),
    }


COLUMNS = {
    "case": (-34, lambda row: row["case"]),
    "us": (9, lambda row: row["us_p50"]),
    "floor": (7, lambda row: row.get("floor_us")),
    "TB/s": (6, lambda row: row["tb_s"]),
    "TFLOP/s": (8, lambda row: row.get("tflops")),
    "of layer": (8, lambda row: row.get("share_of_layer")),
    "BF16 us": (9, lambda row: row.get("best_bf16_us")),
    "speed-up": (8, lambda row: row.get("speed_up")),
    "error": (8, lambda row: row["oracle_error"]),
    "best BF16": (-32, lambda row: row.get("best_bf16")),
}


def main(
    quick: bool = typer.Option(False, help="The most important third."),
    seconds: float = typer.Option(0.0, help="Begin nothing after so long; 0 is 50, or 15 quick."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON and nothing else."),
) -> None:
    """Measures, checks, prints and records."""
    require_gpu()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    budget = Budget(seconds or (15.0 if quick else 50.0))
    ceiling = ceilings()
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "quick": quick,
        **ceiling,
    }
    report = Report("gpu_prefill", settings, COLUMNS, as_json)
    layer = layer_microseconds(32 * K)
    work: dict[str, Callable[[], Iterable[Row]]] = {}
    work["pack compact"] = partial(pack_rows, "compact", 32 * K, ceiling, layer)
    work["extend 512"] = partial(extend_rows, "compact", 512, 32 * K, ceiling)
    if not quick:
        work["extend 128"] = partial(extend_rows, "compact", 128, 128 * K, ceiling)
        for preset in ("quality", "paper", "high"):
            work[f"pack {preset}"] = partial(pack_rows, preset, 32 * K, ceiling, layer)
        work["extend 512 quality"] = partial(extend_rows, "quality", 512, 32 * K, ceiling)
    for name, measurement in budget.within(work):
        report.attempt(name, measurement)
    report.close(budget.skipped)


if __name__ == "__main__":
    typer.run(main)
