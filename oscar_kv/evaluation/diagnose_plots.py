"""Pictures of a diagnosis, after the figures of OScaR (arXiv 2605.19660)."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from oscar_kv.core.rotation import rotate
from oscar_kv.evaluation.diagnose import Diagnosis, Head

_COLORS = {"text": "tab:blue", "image": "tab:orange", "audio": "tab:green", "video": "tab:red"}


def pictures(diagnosis: Diagnosis) -> Iterator[tuple[str, str, bytes]]:
    """Name, caption and PNG of every picture."""
    for draw, caption in (
        (norms, "Key norms over positions, relative to each head's median. Uneven rows and "
         "outliers in one of them are Token Norm Imbalance."),
        (channels, "Mean magnitude of every channel, relative to each head's mean channel, as the "
         "model makes it and after rotation. Bright columns are outliers."),
        (outlier, "Magnitudes of the keys with the largest channel: as they are, rotated, and with "
         "each token's norm factored out, which is what is quantized."),
        (steps, "Relative error of the attention output that each step leaves, for keys, values "
         "and both: the mean over layers, and layer by layer."),
    ):  # fmt: skip
        file = io.BytesIO()
        draw(diagnosis).savefig(file, format="png", dpi=100)
        yield draw.__name__, caption, file.getvalue()


def norms(diagnosis: Diagnosis) -> Figure:
    """A row per head over all positions; below, the head whose groups are most imbalanced."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    found = np.concatenate(
        [
            torch.linalg.vector_norm(layer.states.keys[0].float(), dim=-1).cpu().numpy()
            for layer in diagnosis.attention.values()
        ]
    )
    relative = found / np.maximum(
        np.median(found, axis=1, keepdims=True), np.finfo(np.float32).tiny
    )
    drawn = above.imshow(
        relative.clip(1 / 8, 8),
        norm=LogNorm(1 / 4, 4),
        cmap="RdBu_r",
        aspect="auto",
        interpolation="nearest",
    )
    bar = figure.colorbar(drawn, ax=above, label="norm / median")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    _label_heads(above, diagnosis)
    above.set_title("key norms", size=9)

    heads = _heads(diagnosis)
    worst = max(range(len(heads)), key=lambda i: heads[i][1].norms.group_ratio or float("inf"))
    positions = np.arange(diagnosis.tokens)
    kinds = np.array(diagnosis.kinds)
    for kind in diagnosis.tokens_by_kind:
        of_kind = kinds == kind
        below.scatter(
            positions[of_kind],
            found[worst][of_kind],
            s=3,
            color=_COLORS.get(kind, "tab:blue"),
            label=kind,
        )
    below.axhline(heads[worst][1].norms.median, color="0.5", lw=1, label="median")
    below.set(
        xlabel="position", ylabel="key norm", title=f"layer.head {heads[worst][0]}: the widest"
    )
    below.title.set_fontsize(9)
    below.set_xlim(0, diagnosis.tokens - 1)
    below.set_ylim(0)
    below.legend(fontsize=8, loc="lower right")
    return figure


def channels(diagnosis: Diagnosis) -> Figure:
    """Keys and values, before and after rotation; a row per head, a column per channel."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    grid, scale = figure.subplots(2, 2), Normalize(0, 5)
    for line, name in zip(grid, ("keys", "values")):
        states = [getattr(layer.states, name)[0] for layer in diagnosis.attention.values()]
        for axes, turn, how in zip(line, (_same, rotate), ("as they are", "rotated")):
            rows = torch.cat([turn(x.float()).abs().mean(-2) for x in states]).cpu().numpy()
            mean = rows.mean(1, keepdims=True)
            axes.imshow(
                rows / np.where(mean > 0, mean, 1),
                norm=scale,
                cmap="viridis",
                aspect="auto",
                interpolation="nearest",
            )
            _label_heads(axes, diagnosis)
            axes.set(xlabel="channel")
            axes.set_title(f"{name}, {how}", size=9)
    figure.colorbar(
        ScalarMappable(scale, "viridis"), ax=grid, label="magnitude / mean channel", extend="max"
    )
    return figure


def outlier(diagnosis: Diagnosis) -> Figure:
    """Tokens by channels of the head with the largest key channel, through the steps."""
    heads = _heads(diagnosis)
    most = max(range(len(heads)), key=lambda i: heads[i][1].keys.peak)
    each = [keys for layer in diagnosis.attention.values() for keys in layer.states.keys[0]]
    keys = each[most].float().cpu()
    norm = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    rotated = rotate(keys)
    stages = {
        "keys": keys,
        "rotated": rotated,
        "rotated and scaled": rotated / norm.clamp_min(torch.finfo(torch.float32).tiny),
    }
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, stage) in zip(figure.subplots(1, 3), stages.items()):
        shown = axes.imshow(stage.abs().numpy(), cmap="viridis", aspect="auto")
        figure.colorbar(shown, ax=axes)
        axes.set(xlabel="channel", ylabel="position")
        axes.set_title(f"layer.head {heads[most][0]}, {name}", size=9)
    return figure


def steps(diagnosis: Diagnosis) -> Figure:
    """Error of the attention output step by step, and layer by layer."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    parts, names = ("keys", "values", "both"), [one.name for one in diagnosis.steps]
    for index, part in enumerate(parts):
        at = np.arange(len(names)) + 0.27 * (index - 1)
        left.bar(at, [getattr(one, part) for one in diagnosis.steps], 0.25, label=part)
    labels = [f"{one.name}\n{one.bits:.2f} bits" for one in diagnosis.steps]
    left.set_xticks(range(len(names)), labels, size=7)
    left.set(ylabel="relative error of attention output")
    left.legend(fontsize=8)
    for number, name in enumerate(names):
        errors = [layer.steps[number].both for layer in diagnosis.layers]
        right.plot([layer.index for layer in diagnosis.layers], errors, marker=".", label=name)
    right.set(xlabel="layer", ylim=(0, None))
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
    return figure


def _heads(diagnosis: Diagnosis) -> list[tuple[str, Head]]:
    return [
        (f"{layer.index}.{number}", head)
        for layer in diagnosis.layers
        for number, head in enumerate(layer.heads)
    ]


def _label_heads(axes: Axes, diagnosis: Diagnosis) -> None:
    names = [name for name, _ in _heads(diagnosis)]
    every = -(-len(names) // 16)
    axes.set_yticks(range(0, len(names), every), names[::every], size=7)
    axes.set(ylabel="layer.head")


def _same(x: Tensor) -> Tensor:
    return x
