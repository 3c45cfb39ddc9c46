"""One decode step of one attention layer on a CPU: our cache against Transformers' caches.

    make bench-cpu

A step is ``cache.update`` with one new token and the attention over everything cached: 32 query
heads, 8 KV heads, head_dim 128, float32. The peers are the full-precision ``DynamicCache`` and
Transformers' quantized caches at 2 bits (quanto, HQQ), both attended by SDPA. The steps are too few
for any cache to quantize what it has collected, which favours the peers: they re-quantize
everything then, ours packs one page. Nothing is printed unless the last output of every cache
agrees with the float64 oracle over what it holds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, QuantizedCache
from transformers.cache_utils import Cache

from benchmarks import record
from oscar_kv import OscarConfig
from oscar_kv.config import PRESETS
from oscar_kv.core.attention import attention
from oscar_kv.integrations.attention_function import oscar_attention_forward
from oscar_kv.integrations.lazy import LazyStates
from oscar_kv.integrations.transformers import OscarCache

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TOLERANCE = 1e-4

_MODEL = LlamaConfig(
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
)


class _Module(torch.nn.Module):
    """What an attention function asks of the module that calls it."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


_MODULE = _Module()


def caches() -> dict[str, Callable[[], Cache]]:
    """Every cache that is measured, by name; the full-precision one first."""
    peers = {"axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128}
    return {
        "DynamicCache": lambda: DynamicCache(config=_MODEL),
        "quanto 2-bit": lambda: QuantizedCache("quanto", _MODEL, nbits=2, **peers),
        "HQQ 2-bit": lambda: QuantizedCache("hqq", _MODEL, nbits=2, **{**peers, "axis_key": 1}),
        **{
            f"oscar {name}": lambda name=name: OscarCache(_MODEL, OscarConfig.preset(name))
            for name in PRESETS
        },
    }


class Contestant:
    """One cache that has seen a prompt ``[1, 8, T, 128]``, and its step times."""

    def __init__(self, name: str, cache: Cache, keys: Tensor, values: Tensor) -> None:
        self.name = name
        self.cache = cache
        self.milliseconds: list[float] = []
        self.last: Any = None
        cache.update(keys, values, 0)

    def step(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """One decode step; what it attended over and its output are kept for :meth:`error`."""
        begin = time.perf_counter()
        held = self.cache.update(keys, values, 0)
        out, _ = oscar_attention_forward(_MODULE, query, *held, None)
        self.milliseconds.append((time.perf_counter() - begin) * 1e3)
        self.last = query, held, out

    def error(self) -> float:
        """Relative error of the last step against the float64 oracle over what is cached."""
        query, (keys, values), out = self.last
        if isinstance(keys, LazyStates):
            keys, values = keys.view_of.packed.dense(torch.float64)
        expected = attention(query.double(), keys.double(), values.double())
        return float((out.transpose(1, 2).double() - expected).norm() / expected.norm())

    def row(self) -> dict[str, Any]:
        """Percentiles in milliseconds, the first step left out as warm-up."""
        deciles = statistics.quantiles(self.milliseconds[1:], n=10)
        return {
            "cache": self.name,
            "ms_p20": deciles[1],
            "ms_p50": deciles[4],
            "ms_p80": deciles[7],
        }


@torch.no_grad()
def measure(context: int, steps: int) -> list[dict[str, Any]]:
    """Every cache at one context, taking turns so that disturbances hit all alike."""
    keys, values = torch.randn(2, 1, KV_HEADS, context, HEAD_DIM)
    contestants = [Contestant(name, make(), keys, values) for name, make in caches().items()]
    for _ in range(steps + 1):
        query = torch.randn(1, HEADS, 1, HEAD_DIM)
        new_keys, new_values = torch.randn(2, 1, KV_HEADS, 1, HEAD_DIM)
        for contestant in contestants:
            contestant.step(query, new_keys, new_values)
    errors = [contestant.error() for contestant in contestants]
    for contestant, error in zip(contestants, errors):
        if not error <= TOLERANCE:
            raise SystemExit(f"{contestant.name} at {context} tokens: off by {error:.1e}")
    rows = [contestant.row() for contestant in contestants]
    full = rows[0]["ms_p50"]
    return [
        {"context": context, **row, "oracle_error": error, "vs_full": row["ms_p50"] / full}
        for row, error in zip(rows, errors)
    ]


def main(
    contexts: str = typer.Option("1024,4096,16384,32768", help="Cached tokens, comma-separated."),
    steps: int = typer.Option(20, min=10, max=100, help="Timed steps per cache and context."),
) -> None:
    """Measures, checks, prints and records."""
    torch.manual_seed(0)
    console = Console()
    sizes = [int(context) for context in contexts.split(",")]
    rows = [row for size in track(sizes, "contexts") for row in measure(size, steps)]
    table = Table("context", "cache", "ms/step", "time vs DynamicCache", title="CPU decode step")
    for row in rows:
        milliseconds, ratio = f"{row['ms_p50']:.2f}", f"{row['vs_full']:.2f}x"
        table.add_row(f"{row['context']:,}", row["cache"], milliseconds, ratio)
    console.print(table)
    settings = {
        "query_heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "batch": 1,
        "steps": steps,
    }
    console.print(f"written: {record.write('cpu_decode', settings, rows)}")


if __name__ == "__main__":
    typer.run(main)
