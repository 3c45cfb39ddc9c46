"""One decode step of one attention layer on a CPU: our cache against Transformers' caches.

    make bench-cpu

A step is ``cache.update`` with one new token and the attention over everything cached: 32 query
heads, 8 KV heads, head_dim 128, float32. The peers are the full-precision ``DynamicCache`` and
Transformers' quantized caches at 2 bits (quanto, HQQ), both attended by SDPA. Steps on which a
cache re-quantizes are left out of the peers' medians, in their favour. A row is printed only if
the same run's output agrees with the float64 oracle over what the cache itself holds.
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
from oscar_kv.integrations.lazy import LazyStates
from oscar_kv.integrations.transformers import OscarCache, oscar_attention_forward

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TOLERANCE = 1e-4

_MODEL = LlamaConfig(
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
)


class _Module(torch.nn.Module):
    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


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


@torch.no_grad()
def measure(cache: Cache, keys: Tensor, values: Tensor, steps: int) -> dict[str, float]:
    """Step times in milliseconds after a prompt ``[1, 8, T, 128]``, and the oracle's verdict."""
    module = _Module()
    cache.update(keys, values, 0)
    times, error = [], float("nan")
    for _ in range(steps + 2):
        query = torch.randn(1, HEADS, 1, HEAD_DIM)
        new_keys, new_values = torch.randn(2, 1, KV_HEADS, 1, HEAD_DIM)
        begin = time.perf_counter()
        held_keys, held_values = cache.update(new_keys, new_values, 0)
        out, _ = oscar_attention_forward(module, query, held_keys, held_values, None)
        times.append((time.perf_counter() - begin) * 1e3)
        if len(times) == 2:  # checked while warm, timed afterwards
            if isinstance(held_keys, LazyStates):
                held_keys, held_values = held_keys.view_of.packed.dense(torch.float64)
            expected = attention(query.double(), held_keys.double(), held_values.double())
            error = float((out.transpose(1, 2).double() - expected).norm() / expected.norm())
    p20, p50, p80 = (statistics.quantiles(times[2:], n=10)[i] for i in (1, 4, 7))
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "oracle_error": error}


def main(
    contexts: str = typer.Option("1024,4096,16384,32768", help="Cached tokens, comma-separated."),
    steps: int = typer.Option(20, min=10, help="Timed steps per cache and context."),
) -> None:
    """Measures, checks, prints and records."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    console = Console()
    table = Table("context", "cache", "ms/step", "vs DynamicCache", title="CPU decode step")
    for context in [int(c) for c in contexts.split(",")]:
        keys, values = torch.randn(2, 1, KV_HEADS, context, HEAD_DIM)
        full = 0.0
        for name, make in track(caches().items(), f"{context} tokens", console=console):
            row = measure(make(), keys, values, steps)
            if not row["oracle_error"] <= TOLERANCE:
                raise SystemExit(f"{name} at {context}: output is off by {row['oracle_error']:.1e}")
            full = full or row["ms_p50"]
            rows.append({"context": context, "cache": name, **row})
            table.add_row(
                f"{context:,}", name, f"{row['ms_p50']:.2f}", f"{row['ms_p50'] / full:.2f}x time"
            )
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
