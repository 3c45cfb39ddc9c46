"""Perplexity and recall of any model over caches of every preset, through the public API.

    python -m benchmarks.quality --model PATH --tokens windows.npz:held
    python -m benchmarks.quality --model PATH --text heldout.txt

Windows are prompts of ``--prefix`` tokens followed by teacher-forced steps of 128 tokens, each
attending over the quantized prefix; the steps are scored (`oscar_kv.evaluation.quality`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import oscar_kv.integrations.transformers  # noqa: F401  registers "oscar"
from benchmarks import record
from oscar_kv.config import FULL_PRECISION, PRESETS, OscarConfig
from oscar_kv.evaluation.quality import recall, score
from oscar_kv.evaluation.subject import rows_of_array, rows_of_text
from oscar_kv.planner import ModelShape


def windows_of(rows: torch.Tensor, window: int, count: int) -> torch.Tensor:
    """Up to ``count`` windows ``[N, window]``, the beginnings of evenly spread rows."""
    if not len(rows) or rows.shape[1] < window:
        raise typer.BadParameter(f"rows {tuple(rows.shape)}: expected some of {window} tokens")
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long(), :window]


def main(
    model: str = typer.Option(..., help="Path or id of a causal language model."),
    tokens: str = typer.Option("", help="FILE.npz:NAME, token windows [N, T]."),
    text: Path = typer.Option(Path(), help="A text file, instead of --tokens."),  # noqa: B008
    recall_tokens: str = typer.Option("", help="FILE.npz:NAME, recall windows [N, T]."),
    recall_answers: str = typer.Option("", help="FILE.npz:NAME, answer positions [N, A, K]."),
    window: int = typer.Option(4096, help="Tokens in a window."),
    prefix: int = typer.Option(2048, help="Prompt tokens of a window."),
    windows: int = typer.Option(16, help="How many windows."),
    batch: int = typer.Option(4, help="Windows at a time."),
    dtype: str = typer.Option("float32", help="Of the model: float32 or bfloat16."),
    name: str = typer.Option("quality", help="Of the result file."),
) -> None:
    """Measures, prints and records."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="oscar"
    )
    loaded = loaded.to(device).eval()  # pyright: ignore[reportArgumentType]
    if tokens:
        rows = rows_of_array(tokens)
    else:
        rows = rows_of_text(text, AutoTokenizer.from_pretrained(model), window)
    chosen = windows_of(rows, window, windows)
    names = [FULL_PRECISION, *PRESETS]
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("scoring", total=len(names) * len(chosen))
        scores = score(
            loaded,
            chosen,
            names,
            prefix=prefix,
            batch_size=batch,
            progress=lambda n: progress.advance(task, n),
        )
    recalls = {}
    if recall_tokens:
        planted, answers = rows_of_array(recall_tokens), rows_of_array(recall_answers)
        recalls = {n: recall(loaded, planted, answers, n, batch_size=batch) for n in names}

    layers = ModelShape.from_config(loaded.config).layers
    layer = next(layer for layer, _ in layers if layer.quantized)
    table = Table("cache", "bits/element", "perplexity", "vs full", "same token", "recall")
    measured = []
    for cache in names:
        found, full = scores[cache], scores[FULL_PRECISION]
        bits = 16.0
        if cache != FULL_PRECISION:
            bits = OscarConfig.preset(cache).bits_per_element(
                layer.head_dim, layer.num_kv_heads, layer.value_head_dim
            )
        increase = (found.perplexity / full.perplexity - 1) * 100
        row = {"cache": cache, "bits_per_element": bits, **found.to_dict()}
        measured.append({**row, "increase_percent": increase, "recall": recalls.get(cache)})
        table.add_row(
            cache,
            f"{bits:.2f}",
            f"{found.perplexity:.4f}",
            f"{increase:+.2f}%",
            f"{found.agreement:.2%}",
            f"{recalls[cache]:.2%}" if recalls else "-",
        )
    console.print(table)
    settings = {
        "model": Path(model).name,
        "windows": len(chosen),
        "window": window,
        "prefix": prefix,
        "step": 128,
        "dtype": dtype,
    }
    console.print(f"written: {record.write(name, settings, measured)}")


if __name__ == "__main__":
    typer.run(main)
