"""A diagnosis in words and tables, as files: one self-contained HTML page, pictures, JSON."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from oscar_kv.evaluation.diagnose import LARGE, LOW, Channels, Diagnosis, Head

_SHOWN_POSITIONS = 8
_SENSITIVE_LAYERS = _SHOWN_LAYERS = 3
_HARM = 1.1
"""Times the attention error from which on a step is said to make it worse."""
_NEGLIGIBLE = 1e-3
"""Nats."""


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


def findings(diagnosis: Diagnosis) -> list[str]:
    """What was found, a sentence or two for each kind of measurement."""
    heads = [head for layer in diagnosis.layers for head in layer.heads]
    counts = ", ".join(f"{n:,} {kind}" for kind, n in diagnosis.tokens_by_kind.items())
    return [
        f"Measured on {diagnosis.tokens:,} tokens ({counts}), in "
        f"{_count(len(diagnosis.layers), 'full-attention layer')} with "
        f"{_count(len(heads), 'KV head')} in all.",
        *(
            _channels(name, [one(head) for head in heads], [rotated(head) for head in heads])
            for name, one, rotated in (
                ("Key", lambda head: head.keys, lambda head: head.rotated_keys),
                ("Value", lambda head: head.values, lambda head: head.rotated_values),
            )
        ),
        _norms(diagnosis, heads),
        _shared(heads, "low-norm", f"under {LOW:g}", lambda head: head.norms.low),
        _shared(heads, "large-norm", f"over {LARGE:g}", lambda head: head.norms.large),
        *_kinds(heads),
        *_steps(diagnosis, heads),
        *_rotation(diagnosis, heads),
        *_sensitive(diagnosis),
    ]


def tables(diagnosis: Diagnosis) -> list[Table]:
    """Presets and steps."""
    return [
        Table(
            "Presets, decoding what follows",
            ["preset", "bits", "KL, nats", "same token", "attention error"],
            [
                [
                    one.name,
                    f"{one.bits:.2f}",
                    f"{one.kl:.4f}",
                    f"{one.agreement:.1%}",
                    f"{one.attention:.4f}",
                ]
                for one in diagnosis.presets
            ],
        ),
        Table(
            "Error of the attention output, step by step",
            ["step", "bits", "keys", "values", "both"],
            [
                [s.name, f"{s.bits:.2f}", f"{s.keys:.4f}", f"{s.values:.4f}", f"{s.both:.4f}"]
                for s in diagnosis.steps
            ],
        ),
    ]


def _sensitive(diagnosis: Diagnosis) -> list[str]:
    """Which layers would gain most by more bits."""
    losses = sorted(diagnosis.sensitivity.items(), key=lambda one: -one[1])[:_SENSITIVE_LAYERS]
    total = sum(diagnosis.sensitivity.values())
    if sum(loss for _, loss in losses) <= total / 2 or total < _NEGLIGIBLE:
        return []
    shares = ", ".join(f"{index} ({loss / total:.0%})" for index, loss in losses)
    first = losses[0][0]
    return [
        f"Of what all {len(diagnosis.sensitivity)} layers cost when they are packed one at a time, "
        f"{total:.4f} nats of divergence, most is due to layers {shares}. More precise keys there "
        f"help most: OscarCache(model.config, layers={{{first}: OscarConfig.high()}})."
    ]


def head_table(diagnosis: Diagnosis) -> Table:
    """A row per KV head."""
    first, last = diagnosis.steps[0].name, diagnosis.steps[-1].name
    rows = []
    for layer in diagnosis.layers:
        for number, head in enumerate(layer.heads):
            norms, plain, ours = head.norms, head.key_groups[first], head.key_groups[last]
            values = head.value_groups
            rows.append(
                [
                    f"{layer.index}.{number}",
                    f"{norms.minimum:.3g} / {norms.median:.3g} / {norms.maximum:.3g}",
                    f"{norms.variation:.2f}",
                    _times(norms.group_ratio),
                    f"{len(norms.low)} / {len(norms.large)}",
                    f"{head.keys.peak:.1f} / {head.rotated_keys.peak:.1f}",
                    f"{head.keys.kurtosis:.1f} / {head.rotated_keys.kurtosis:.1f}",
                    f"{head.values.peak:.1f} / {head.rotated_values.peak:.1f}",
                    f"{plain.median_group:.3f} / {ours.median_group:.3f}",
                    f"{plain.worst_group:.3f} / {ours.worst_group:.3f}",
                    f"{plain.worst_token:.3f} / {ours.worst_token:.3f}",
                    f"{values[first].median_group:.3f} / {values[last].median_group:.3f}",
                    f"{head.attention[first]:.3f} / {head.attention[last]:.3f}",
                ]
            )
    header = [
        "layer.head",
        "key norm: min / median / max",
        "variation",
        "max / min in a group",
        "low / large tokens",
        "key peak: before / after rotation",
        "key kurtosis",
        "value peak",
        "key group error, median: first / last step",
        "worst group",
        "worst token",
        "value error, median",
        "attention error",
    ]
    return Table("Heads", header, rows)


def write(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Writes ``diagnosis.html``, ``diagnosis.json`` and, where matplotlib is, the pictures.

    Returns what was written.

    Raises:
        ValueError: if the folder cannot be written.
    """
    chosen = diagnosis.recommendation
    body = [
        f"<h1>What quantization meets in {html.escape(diagnosis.model)}</h1>",
        f"<p class=choice><b>{html.escape(chosen.preset or 'No preset')}</b>: "
        f"{html.escape(chosen.reason)}</p><ul>",
        *(f"<li>{html.escape(one)}</li>" for one in findings(diagnosis)),
        "</ul>",
        *map(_html_table, tables(diagnosis)),
    ]
    files = {"diagnosis.json": json.dumps(diagnosis.to_dict(), allow_nan=False, indent=1).encode()}
    for name, caption, png in _pictures(diagnosis):
        files[f"{name}.png"] = png
        data = base64.b64encode(png).decode()
        body.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    body.append(_html_table(head_table(diagnosis)))
    files["diagnosis.html"] = _PAGE.replace("BODY", "\n".join(body)).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return [folder / name for name in files]


def _pictures(diagnosis: Diagnosis) -> Iterable[tuple[str, str, bytes]]:
    """Names, captions and PNGs, none without matplotlib."""
    if not can_draw():
        return ()
    from oscar_kv.evaluation.diagnose_plots import pictures

    return pictures(diagnosis)


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _channels(name: str, before: Sequence[Channels], after: Sequence[Channels]) -> str:
    peaks, rotated = ([one.peak for one in found] for found in (before, after))
    tails = [median(one.kurtosis for one in found) for found in (before, after)]
    return (
        f"{name} channels: the largest is {median(peaks):.1f} times the mean channel in the median "
        f"head, {max(peaks):.1f} times in the worst; after rotation {median(rotated):.1f} and "
        f"{max(rotated):.1f}. Kurtosis (3 is normal) {tails[0]:.1f}, after rotation {tails[1]:.1f}."
    )


def _norms(diagnosis: Diagnosis, heads: Sequence[Head]) -> str:
    ratios = [head.norms.group_ratio or float("inf") for head in heads]
    spread = median(head.norms.variation for head in heads)
    return (
        "Token Norm Imbalance: the largest key norm within a group of 128 tokens is up to "
        f"{_times(median(ratios))} the smallest in the median head, up to {_times(max(ratios))} in "
        f"the worst; the norms of a head vary by {spread:.0%} of their mean (median head)."
    )


def _shared(heads: Sequence[Head], name: str, how: str, of: Callable[[Head], Sequence[int]]) -> str:
    counts: dict[int, int] = {}
    for head in heads:
        for position in of(head):
            counts[position] = counts.get(position, 0) + 1
    with_some = sum(bool(of(head)) for head in heads)
    begin = f"Tokens that are {name} ({how} times the median key norm): in {with_some} of "
    begin += f"{len(heads)} heads"
    common = sorted(position for position, count in counts.items() if 2 * count >= len(heads))
    if not common:
        return f"{begin}; none is so in half of the heads."
    shown = ", ".join(map(str, common[:_SHOWN_POSITIONS]))
    more = len(common) - _SHOWN_POSITIONS
    return f"{begin}; in half of them or more at positions {shown}" + (
        f" and {more} others." if more > 0 else "."
    )


def _kinds(heads: Sequence[Head]) -> list[str]:
    kinds = list(heads[0].norms.median_by_kind)
    if len(kinds) < 2 or "text" not in kinds:
        return []
    said = []
    for kind in (kind for kind in kinds if kind != "text"):
        medians = [head.norms.median_by_kind for head in heads]
        ratios = [found[kind] / found["text"] for found in medians if found["text"] > 0]
        if ratios:
            said.append(
                f"Keys of {kind} tokens have {median(ratios):.2f} times the norm of text tokens in "
                f"the median head, {min(ratios):.2f} to {max(ratios):.2f} over all heads."
            )
    return said


def _steps(diagnosis: Diagnosis, heads: Sequence[Head]) -> list[str]:
    said = []
    for before, step in zip(diagnosis.steps, diagnosis.steps[1:]):
        worst = [
            median(head.key_groups[name].worst_token for head in heads)
            for name in (before.name, step.name)
        ]
        change = f"{step.both / before.both - 1:+.0%}" if before.both else "no change"
        said.append(
            f"{step.name.removeprefix('+ ').capitalize()}: attention error {before.both:.3f} -> "
            f"{step.both:.3f} ({change}), worst key of the median head {worst[0]:.2f} -> "
            f"{worst[1]:.2f}, at {step.bits:.2f} bits."
        )
    return said


def _rotation(diagnosis: Diagnosis, heads: Sequence[Head]) -> list[str]:
    """What it means, and what to do, where rotation makes attention worse."""
    plain, rotated = diagnosis.steps[:2]
    if rotated.both <= _HARM * plain.both:
        return []
    harms = {
        layer.index: layer.steps[1].both / layer.steps[0].both
        for layer in diagnosis.layers
        if layer.steps[1].both > _HARM * layer.steps[0].both > 0
    }
    worst = sorted(harms, key=lambda index: -harms[index])[:_SHOWN_LAYERS]
    where = ", ".join(f"layer {index} ({harms[index]:.1f} times the error)" for index in worst)
    said = f"Rotation makes attention worse here, most in {where}. "
    if rotated.keys * plain.values >= rotated.values * plain.keys:
        off = [
            median(head.key_groups[step.name].whole for head in heads) for step in (plain, rotated)
        ]
        said += (
            f"Keys themselves are off by {off[0]:.2f} without it and by {off[1]:.2f} with it "
            "(median head), but it takes their error from the channels that vary most into all "
            "others, and queries read others more. "
        )
    said += "Every preset rotates, so what the presets do to the logits counts this. "
    if diagnosis.recommendation.preset:
        return [f"{said}{diagnosis.recommendation.preset} is close enough all the same."]
    return [
        f"{said}None is close enough: keep full precision for this model, or try 4 bits in groups "
        "of 32, OscarConfig(key_bits=4, value_bits=4, key_group=32)."
    ]


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _times(ratio: float | None) -> str:
    return "without bound" if ratio is None or ratio == float("inf") else f"{ratio:.1f} times"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    head = row(table.header, "th")
    drawn = f"<div class=wide><table>{head}{body}</table></div>"
    return f"<h2>{html.escape(table.title)}</h2>{drawn}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>oscar-kv: diagnosis</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border-bottom: 1px solid #ccc; }
td:not(:first-child), th:not(:first-child) { text-align: right; }
.wide { overflow-x: auto; } .wide table:has(th:nth-child(9)) { font-size: 12px; }
.wide :has(th:nth-child(9)) :is(td, th) { padding: .2em .5em; }
.choice { background: #eef6ee; padding: .8em; } figcaption { color: #666; }
figure { margin: 1.5em 0; } img { max-width: 100%; }
</style>
BODY
</html>
"""
