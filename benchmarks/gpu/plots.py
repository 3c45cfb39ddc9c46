"""Pictures of what `kernel.py` and `model.py` wrote.

    python -m benchmarks.gpu.plots [--out FOLDER]

Speed-up of decode attention over context, achieved bandwidth against the measured ceilings, and a
model's latency and throughput. Nothing is drawn that a benchmark refused to compare.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import record

Row = dict[str, Any]


def speed_up(result: Row) -> Figure:
    """Speed-up over the best BF16 kernel by context, a line per batch and one per preset."""
    figure, axes = _figure(result)
    rows = _usual_heads(result)
    for batch in sorted({row["batch"] for row in rows}):
        chosen = [r for r in rows if r["batch"] == batch and r["preset"] == "compact"]
        _line(axes, chosen, "context", "speed_up", f"batch {batch}", "o-")
    for preset in ("quality", "paper", "high"):
        chosen = [r for r in rows if r["preset"] == preset]
        _line(axes, chosen, "context", "speed_up", preset, "x", linestyle="none")
    axes.axhline(1, color="grey", linewidth=0.8)
    _context_axis(axes)
    axes.set_ylabel("times faster than the best BF16 kernel")
    axes.legend(fontsize="small", ncols=2)
    return figure


def roofline(result: Row) -> Figure:
    """TB/s of packed bytes over the bytes of a call, below the ceilings of this GPU."""
    figure, axes = _figure(result)
    rows = _usual_heads(result)
    for preset in dict.fromkeys(row["preset"] for row in rows):
        chosen = [row for row in rows if row["preset"] == preset]
        axes.plot(
            [row["bytes"] / 1e6 for row in chosen],
            [row["tb_s"] for row in chosen],
            "o",
            label=preset,
        )
    for name, style in (("read", "-"), ("copy", "--")):
        ceiling = result["settings"][f"{name}_tb_s"]
        label = f"measured {name}, {ceiling:.2f} TB/s"
        axes.axhline(ceiling, color="black", linestyle=style, linewidth=0.8, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("MB of pages and tail read per call")
    axes.set_ylabel("TB/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure


def model(result: Row) -> Figure:
    """Milliseconds per token by context, and tokens per second at the largest batches."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    rows = [row for row in result["rows"] if row.get("speed_up")]
    single = [row for row in rows if row["case"].startswith("latency")]
    preset = result["settings"]["preset"]
    for side, label, style in (("bf16", "BF16", "s-"), ("ours", preset, "o-")):
        flat = [{"context": row["context"], **row[side]} for row in single]
        _line(latency, flat, "context", "ms_p50", label, style)
        _line(latency, flat, "context", "roofline_ms", f"{label}, roofline", ":", linewidth=1)
    _context_axis(latency)
    latency.set_ylabel("ms per token, batch 1")
    latency.set_ylim(bottom=0)
    latency.legend(fontsize="small")
    largest = sorted(
        (row for row in rows if row["case"].endswith("largest")), key=lambda r: r["context"]
    )
    for offset, side, label in ((-0.2, "bf16", "BF16"), (0.2, "ours", preset)):
        bars = throughput.bar(
            [index + offset for index in range(len(largest))],
            [row[side]["tokens_per_s"] for row in largest],
            width=0.4,
            label=label,
        )
        throughput.bar_label(bars, [f"batch {row[side]['batch']}" for row in largest], fontsize=7)
    throughput.set_xticks(range(len(largest)), [_tokens(row["context"]) for row in largest])
    throughput.set_xlabel("context, largest batch that fits")
    throughput.set_ylabel("tokens/s")
    throughput.legend(fontsize="small")
    figure.suptitle(_where(result), fontsize="small")
    return figure


PICTURES = {
    "speed_up": ("gpu_kernel", speed_up),
    "roofline": ("gpu_kernel", roofline),
    "model": ("gpu_model", model),
}


def draw(results: Path, out: Path) -> list[Path]:
    """Draws what there are results for; returns the files."""
    drawn = []
    for name, (source, picture) in PICTURES.items():
        path = results / f"{source}.json"
        if path.is_file():
            out.mkdir(parents=True, exist_ok=True)
            drawn.append(out / f"gpu_{name}.svg")
            picture(json.loads(path.read_text())).savefig(drawn[-1])
    return drawn


def _figure(result: Row) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_where(result), fontsize="small")
    return figure, axes


def _where(result: Row) -> str:
    found = result["environment"]
    return f"{found['gpu']}, torch {found['versions']['torch']}, commit {found['commit']}"


def _usual_heads(result: Row) -> list[Row]:
    """Rows of 32/8 heads of 128, uniform lengths, the preset's own recent window, compared."""
    return [
        row
        for row in result["rows"]
        if row.get("speed_up")
        and row["kind"] == "uniform"
        and (row["heads"], row["kv_heads"], row["head_dim"]) == (32, 8, 128)
        and (row["recent_tokens"] or row["preset"] == "paper")
    ]


def _line(axes: Axes, rows: Sequence[Row], x: str, y: str, label: str, *style: Any, **more: Any):
    if rows:
        rows = sorted(rows, key=lambda row: row[x])
        axes.plot([row[x] for row in rows], [row[y] for row in rows], *style, label=label, **more)


def _context_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [1024 << shift for shift in range(0, 10, 2)])
    axes.set_xticklabels([_tokens(tick) for tick in ticks])
    axes.set_xlabel("context, tokens")


def _tokens(count: int) -> str:
    return f"{count // 1024}K"


def main(
    out: Path = typer.Option(record.RESULTS, help="Folder for the pictures."),  # noqa: B008
) -> None:
    """Draws and says what was drawn."""
    for path in draw(record.RESULTS, out):
        print(path)


if __name__ == "__main__":
    typer.run(main)
