"""Pictures of a table: quality against bits, recall by depth and length, drift by position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from oscar_kv.evaluation.report import Table, label
from oscar_kv.evaluation.runner import Row

_OURS = ("Oscar", "OscarCache", "Ablation")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes ``stem.png`` and ``stem.svg``, the latter the same for the same figure."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "oscar-kv"}):
        figure.savefig(files[0], dpi=120)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def pictures(table: Table) -> Iterator[tuple[str, Figure]]:
    """Every picture of a table with the name of its kind."""
    yield "pareto", pareto(table)
    if table.task["name"] == "recall":
        yield "map", recall_map(table)
    if table.task["name"] == "drift":
        yield "positions", drift(table)


def pareto(table: Table) -> Figure:
    """The primary metric against bits per element, both as measured; the front is a line."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    metric, front = table.primary, table.front()
    line = []
    for row in table.rows:
        bits, value = row["bits_per_element"], metric.value(row)
        if metric.log and value <= 0:
            continue  # no error at all: the full cache
        ours = _is_ours(row)
        axes.scatter(bits, value, color="tab:red" if ours else "tab:blue", zorder=3)
        axes.annotate(label(row), (bits, value), xytext=(4, 3), textcoords="offset points", size=7)
        if row["method"]["name"] in front:
            line.append((bits, value))
    bits, values = zip(*sorted(line)) if line else ((), ())
    axes.plot(bits, values, color="0.7", lw=1, zorder=1)
    axes.set(
        xlabel="bits per element, full-precision tokens included",
        ylabel=metric.title,
        title=table.caption,
        xscale="log",
        yscale="log" if metric.log else "linear",
    )
    axes.title.set_fontsize(8)
    ticks = [2, 2.5, 3, 4, 5, 6, 8, 12, 16]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return figure


def recall_map(table: Table) -> Figure:
    """A heat map of recall per contender: depth downwards, context length to the right."""
    columns = min(6, len(table.rows))
    lines = -(-len(table.rows) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.2 * lines), layout="constrained")
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, row in zip(figure.axes, table.rows):
        shares = np.array(row["result"]["map"]).T
        axes.axis("on")
        axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(label(row), size=8)
        lengths = table.task["lengths"]
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], size=7)
        depths = len(shares)
        axes.set_yticks(range(depths), [f"{(d + 0.5) / depths:.0%}" for d in range(depths)], size=7)
    return figure


def drift(table: Table) -> Figure:
    """KL divergence by position, a line per contender."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for row in table.rows:
        values = row["result"]["kl_by_position"]
        if not any(values):
            continue  # the full cache
        positions = [
            table.task["prefix"] + table.task["bucket"] * (i + 0.5) for i in range(len(values))
        ]
        ours = _is_ours(row)
        axes.plot(
            positions, values, lw=2 if ours else 1, ls="-" if ours else "--", label=label(row)
        )
    axes.set(xlabel="position", ylabel="KL, nats", yscale="log", title=table.caption)
    axes.title.set_fontsize(8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return figure


def _is_ours(row: Row) -> bool:
    """Whether a contender, or the base of two in one cache, is."""
    method = row["method"]
    return method.get("base", method)["class"] in _OURS
