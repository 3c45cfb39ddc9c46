"""A whole model decoding over a 2-bit and over a BF16 cache: latency, throughput, memory.

    oscar-kv bench model [--quick]

A Llama-3.1-8B-shaped model (``benchmarks/configs/llama_8b.json``) with random BF16 weights; what
it says does not matter, what it costs does. Both sides decode in the same loop, greedily, one CUDA
graph replay (`DecodeGraph`) and one argmax per step: the BF16 side over `static_cache.py`, ours
over ``OscarCache(max_tokens=...)``. What surrounds cache and attention in a decoder layer is
compiled (`compile_layers`), the same code for both: otherwise dozens of small kernels per layer,
which no cache makes faster, would hide what is compared. Caches are filled with random states
through ``update``, not by a prefill.

Before anything is compared, the logits of both graphs at a short context are checked against the
same model, not compiled, attending with PyTorch's SDPA over the same states; and in every row the
attention of the last layer is checked against the float64 oracle, at the shape and on the cache
just timed. The roofline is the weights and the KV cache, each read once at the measured read
bandwidth.

``latency`` rows: one sequence. ``throughput`` rows: the largest batch that fits, found by
arithmetic on free memory and verified by running it, and both sides at BF16's largest batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu import oracle
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.sides import Bf16, Oscar, Side
from benchmarks.gpu.timing import (
    Budget,
    ceilings,
    device,
    release,
    require_gpu,
    summarize,
    time_replays,
)
from oscar_kv.integrations.compile import compile_layers
from oscar_kv.integrations.graph import DecodeGraph

CONFIG = Path(__file__).parent.parent / "configs" / "llama_8b.json"
K = 1024
LOGITS_TOLERANCE = 1e-1
"""Two BF16 attentions, each off by a few thousandths, through 32 layers."""
STEPS = 24
SPARE_TOKENS = 64
"""Room for the steps of a row, warm-up included."""
RESERVE = 4 << 30
"""Bytes left to activations, workspaces and fragmentation when a cache fills the memory."""


def build(config: Any, where: torch.device) -> PreTrainedModel:
    """The model with random weights, made where it will run."""
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a step reads: all but the embedding table."""
    table = model.get_input_embeddings()
    total = sum(p.numel() * p.itemsize for p in model.parameters())
    output: Any = model.get_output_embeddings()
    embedding: Any = table
    tied = output is not None and output.weight is embedding.weight
    return total if tied else total - embedding.weight.nbytes


@torch.no_grad()
def logits_error(side: Side, batch: int = 2, context: int = K, steps: int = 3) -> float:
    """The graph's logits against SDPA over the same states, the largest error of a few steps."""
    cache = side.filled(batch, context, context + SPARE_TOKENS)
    twin = side.exact(side.filled(batch, context, context + SPARE_TOKENS))
    side.model.set_attn_implementation("sdpa")
    ids = torch.arange(1, batch * steps + 1, device=side.device).view(steps, batch, 1)
    with torch.compiler.set_stance("force_eager"):
        expected = [side.model(step, past_key_values=twin).logits[:, -1] for step in ids]
    side.serve(cache)
    graph = DecodeGraph(side.model, cache)
    found = [graph(step).clone() for step in ids]
    return oracle.worst(oracle.relative_error(a, b) for a, b in zip(found, expected))


@torch.no_grad()
def decode(side: Side, batch: int, context: int, steps: int = STEPS) -> Row:
    """Milliseconds per step, and what the cache took."""
    before = torch.cuda.memory_allocated()
    cache = side.filled(batch, context, context + SPARE_TOKENS)
    torch.cuda.reset_peak_memory_stats()
    side.serve(cache)
    graph = DecodeGraph(side.model, cache)
    state: list[Tensor] = [torch.ones(batch, 1, dtype=torch.long, device=side.device)]

    def step() -> None:
        state[0] = graph(state[0]).argmax(-1, keepdim=True)

    p20, p50, p80 = (us / 1e3 for us in summarize(time_replays(step, steps, 1)))
    finite = bool(graph(state[0]).isfinite().all())
    return {
        "batch": batch,
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "tokens_per_s": batch / p50 * 1e3,
        "kv_bytes": cache.nbytes,
        "kv_bytes_read": side.bytes_read(cache),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "oracle_error": side.attention_error(cache) if finite else math.nan,
    }


def largest_batch(side: Side, context: int, free: int) -> int:
    """How many sequences fit ``free`` bytes, by arithmetic."""
    logits = 6 * side.config.vocab_size + 64 * side.config.hidden_size
    return max(1, (free - RESERVE) // (side.bytes_per_sequence(context + SPARE_TOKENS) + logits))


def decode_largest(side: Side, context: int, steps: int) -> Row:
    """The largest batch that really runs: the one computed, or a little less."""
    release()
    batch = largest_batch(side, context, torch.cuda.mem_get_info()[0])
    for _ in range(4):
        try:
            return decode(side, batch, context, steps)
        except torch.cuda.OutOfMemoryError:
            batch = max(1, batch * 15 // 16 - 1)
        release()
    raise RuntimeError(f"{side.name} does not run at {context} tokens, even with batch {batch}")


class Comparison:
    """Rows of both sides, and what proves them comparable."""

    def __init__(self, bf16: Side, ours: Side, ceiling: dict[str, float]) -> None:
        self.bf16, self.ours = bf16, ours
        self.weights = weight_bytes(bf16.model)
        self.bandwidth = ceiling["read_tb_s"]
        self.logits = {side.name: logits_error(side) for side in (bf16, ours)}

    def latency(self, context: int) -> Iterator[Row]:
        """One sequence."""
        yield self._row(f"latency {context // K}K", context, *self._both(context, 1))

    def throughput(self, context: int, steps: int = 8) -> Iterator[Row]:
        """The largest batches, and both sides at BF16's."""
        case = f"throughput {context // K}K"
        bf16 = decode_largest(self.bf16, context, steps)
        release()
        same = decode(self.ours, bf16["batch"], context, steps)
        yield self._row(f"{case}, batch {bf16['batch']}", context, bf16, same)
        ours = decode_largest(self.ours, context, steps)
        yield self._row(f"{case}, largest", context, bf16, ours)

    def _both(self, context: int, batch: int) -> Iterator[Row]:
        for side in (self.bf16, self.ours):
            release()
            yield decode(side, batch, context)

    def _row(self, case: str, context: int, bf16: Row, ours: Row) -> Row:
        """Both sides of one case; ratios only if all four checks hold."""
        trusted = all(error <= LOGITS_TOLERANCE for error in self.logits.values())
        errors = [side["oracle_error"] if trusted else None for side in (bf16, ours)]
        for side in (bf16, ours):
            nbytes = self.weights + side["kv_bytes_read"]
            side["roofline_ms"] = nbytes / self.bandwidth / 1e9
        per_token = [side["ms_p50"] / side["batch"] for side in (bf16, ours)]
        return {
            "case": case,
            "context": context,
            "bf16": bf16,
            "ours": ours,
            "logits_error": self.logits,
            "speed_up": oracle.speed_up(*per_token, *errors),
            "memory_ratio": bf16["kv_bytes"] / bf16["batch"] / (ours["kv_bytes"] / ours["batch"]),
        }


COLUMNS = {
    "case": (-30, lambda row: row["case"]),
    "BF16 batch": (10, lambda row: row["bf16"]["batch"]),
    "ms": (7, lambda row: row["bf16"]["ms_p50"]),
    "floor": (7, lambda row: row["bf16"]["roofline_ms"]),
    "tokens/s": (9, lambda row: row["bf16"]["tokens_per_s"]),
    "KV GiB": (7, lambda row: row["bf16"]["kv_bytes"] / (1 << 30)),
    "our batch": (9, lambda row: row["ours"]["batch"]),
    "our ms": (7, lambda row: row["ours"]["ms_p50"]),
    "our floor": (9, lambda row: row["ours"]["roofline_ms"]),
    "our tokens/s": (12, lambda row: row["ours"]["tokens_per_s"]),
    "our KV": (7, lambda row: row["ours"]["kv_bytes"] / (1 << 30)),
    "speed-up": (8, lambda row: row["speed_up"]),
}


def chosen(quick: bool, only: str) -> dict[str, tuple[str, int]]:
    """Cases by name: a method of `Comparison` and the tokens of context."""
    contexts = {
        "latency": (1, 32, 128) if quick else (1, 4, 16, 32, 64, 128),
        "throughput": (32,) if quick else (32, 4, 128),
    }
    cases = {f"{kind} {k}K": (kind, k * K) for kind, ks in contexts.items() for k in ks}
    if only and only not in cases:
        raise typer.BadParameter(f"--only {only!r}: expected one of {list(cases)}")
    return {only: cases[only]} if only else cases


def main(
    preset: str = typer.Option("compact", help="Of our side."),
    quick: bool = typer.Option(False, help="The most important third."),
    only: str = typer.Option(
        "", help="Just this, such as 'throughput 4K', to gpu_model_part.json."
    ),
    seconds: float = typer.Option(0.0, help="Begin nothing after so long; 0 is 215, or 65 quick."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON and nothing else."),
) -> None:
    """Measures, checks, prints and records."""
    cases = chosen(quick, only)
    require_gpu()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    budget = Budget(seconds or (65.0 if quick else 215.0))
    ceiling = ceilings()
    config = AutoConfig.from_pretrained(CONFIG)
    model = build(config, device())
    compile_layers(model, options={"coordinate_descent_tuning": True})
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than measure eager layers
    settings: dict[str, Any] = {
        "model": CONFIG.name,
        "preset": preset,
        "dtype": "bfloat16",
        "compiled": "decoder layers of both sides, around cache and attention, tuned",
        "weight_bytes": weight_bytes(model),
        "logits_tolerance": LOGITS_TOLERANCE,
        "quick": quick,
        **ceiling,
    }
    report = Report("gpu_model_part" if only else "gpu_model", settings, COLUMNS, as_json)
    compared = Comparison(Bf16(model), Oscar(model, preset), ceiling)
    report.console.print(f"logits against SDPA over the same states: {compared.logits}")
    for name, (kind, context) in budget.within(cases):
        report.attempt(name, partial(getattr(compared, kind), context))
    report.close(budget.skipped)


if __name__ == "__main__":
    typer.run(main)
