"""What runs have measured as tables: Markdown, one self-contained HTML page, parts of a page."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oscar_kv.evaluation.runner import Row, read_rows
from oscar_kv.evaluation.suites import PAPER_GRID, SAME_WINDOW

LONG_CONTEXT = 32768
"""Tokens for which bits are worked out beside those of the evaluated length."""


@dataclass(frozen=True)
class Metric:
    """One number of a result."""

    title: str
    value: Callable[[Row], float]
    text: Callable[[Row], str]
    higher_is_better: bool = False
    log: bool = True


def _percent(key: str, digits: int = 2) -> Callable[[Row], str]:
    return lambda row: f"{row['result'][key]:.{digits}%}"


def _number(key: str, digits: int = 4) -> Callable[[Row], str]:
    return lambda row: f"{row['result'][key]:.{digits}f}"


def _of(key: str) -> Callable[[Row], float]:
    return lambda row: row["result"][key]


def _increase(row: Row) -> str:
    error = row["result"]["increase_error"]
    spread = "" if error is None else f" ± {error:.2f}"
    return f"{row['result']['increase_percent']:+.2f}%{spread}"


def _bucket(index: int) -> Callable[[Row], float]:
    return lambda row: row["result"]["kl_by_position"][index]


METRICS: dict[str, list[Metric]] = {
    "perplexity": [
        Metric("perplexity", _of("perplexity"), _number("perplexity", 3)),
        Metric("increase", _of("increase_percent"), _increase),
        Metric("KL, nats", _of("kl"), _number("kl")),
        Metric("same token", _of("agreement"), _percent("agreement"), higher_is_better=True),
    ],
    "recall": [
        Metric("recall", _of("recall"), _percent("recall", 1), higher_is_better=True, log=False)
    ],
    "drift": [
        Metric("KL, nats", _of("kl"), _number("kl")),
        Metric("first positions", _bucket(0), lambda row: f"{_bucket(0)(row):.4f}"),
        Metric("last positions", _bucket(-1), lambda row: f"{_bucket(-1)(row):.4f}"),
    ],
    "attention": [Metric("output error", _of("error"), _number("error"))],
}
HEADLINES = {
    "perplexity": "increase",
    "recall": "recall",
    "drift": "KL, nats",
    "attention": "output error",
}
"""What one number says of a task."""
PRIMARY = {"perplexity": "KL, nats", "recall": "recall", "drift": "KL, nats"}
"""What decides the Pareto front of a task; the first metric of the others."""


@dataclass(frozen=True)
class Table:
    """All rows of one model, task and seed."""

    model: dict[str, Any]
    task: dict[str, Any]
    rows: list[Row]

    @property
    def metrics(self) -> list[Metric]:
        return METRICS[self.task["name"]]

    @property
    def primary(self) -> Metric:
        wanted = PRIMARY.get(self.task["name"], self.metrics[0].title)
        return next(metric for metric in self.metrics if metric.title == wanted)

    @property
    def caption(self) -> str:
        settings = ", ".join(
            f"{key} {value}"
            for key, value in self.task.items()
            if key not in ("name", "definition", "question", "batch")
        )
        return f"{self.task['name']} on {self.model['name']} ({settings})"

    def front(self) -> set[str]:
        """Names of the contenders that none beats with as few bits."""
        sign = 1 if self.primary.higher_is_better else -1
        points = [
            (row["bits_per_element"], sign * self.primary.value(row), row["method"]["name"])
            for row in self.rows
        ]
        return {
            name
            for bits, score, name in points
            if not any(b <= bits and s >= score and (b, s) != (bits, score) for b, s, _ in points)
        }

    @property
    def header(self) -> list[str]:
        titles = [metric.title for metric in self.metrics]
        return ["method", "bits", f"bits at {LONG_CONTEXT // 1024}K", *titles, "front"]

    def cells(self) -> list[list[str]]:
        """One list of texts per contender."""
        front = self.front()
        return [
            [
                label(row),
                f"{row['bits_per_element']:.2f}",
                f"{bits_at(row, LONG_CONTEXT):.2f}",
                *(metric.text(row) for metric in self.metrics),
                "*" if row["method"]["name"] in front else "",
            ]
            for row in self.rows
        ]

    def markdown(self) -> str:
        """Caption and table."""
        lines = [self.header, ["---"] * len(self.header), *self.cells()]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"**{self.caption[0].upper()}{self.caption[1:]}**\n\n{table}\n"

    def html(self) -> str:
        """The same as HTML."""
        body = "".join(_html_row(cells, "td") for cells in self.cells())
        head = _html_row(self.header, "th")
        return f"<h3>{html.escape(self.caption)}</h3><table>{head}{body}</table>"


@dataclass(frozen=True)
class Section:
    """The results of one file."""

    title: str
    tables: list[Table]

    @classmethod
    def read(cls, path: Path) -> Section:
        """The rows of ``path``, sorted into tables.

        Raises:
            ValueError: if there is nothing, or something else.
        """
        tables: dict[str, Table] = {}
        for row in read_rows(path):
            if row["task"]["name"] not in METRICS:
                raise ValueError(f"{path}: unknown task {row['task']['name']!r}")
            key = repr((row["model"], row["task"], row["seed"]))
            table = tables.setdefault(key, Table(row["model"], row["task"], []))
            table.rows.append(row)
        if not tables:
            raise ValueError(f"{str(path)!r}: no results")
        return cls(path.stem, list(tables.values()))

    def markdown(self) -> str:
        """Where it was measured, then every table."""
        return "\n".join([self.provenance() + "\n", *(table.markdown() for table in self.tables)])

    def provenance(self) -> str:
        """Hardware, versions, commits and hashes, as one line."""
        rows = [row for table in self.tables for row in table.rows]
        found = [row["environment"] for row in rows]
        used = {
            "": {e["gpu"] or e["cpu"] for e in found},
            "Python ": {e["python"] for e in found},
            "torch ": {e["versions"]["torch"] for e in found},
            "transformers ": {e["versions"]["transformers"] for e in found},
            "model weights ": {row["model"]["weights"] for row in rows},
            "text ": {row["model"]["text"] for row in rows},
            "dtype ": {row["model"]["dtype"] for row in rows},
            "seed ": {str(row["seed"]) for row in rows},
            "commit ": {e["commit"] for e in found},
        }
        return "; ".join(name + ", ".join(sorted(values)) for name, values in used.items()) + "."


@dataclass(frozen=True)
class Overview:
    """All that was measured of one model: a line per method, a column per task."""

    title: str
    header: list[str]
    cells: list[list[str]]


def overviews(rows: Sequence[Row]) -> list[Overview]:
    """One for every model, text and seed of ``rows``."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(repr((row["model"], row["seed"])), []).append(row)
    return [_overview(of_model) for of_model in by_model.values()]


def headline(row: Row) -> Metric:
    """The metric that says most about a row in one number."""
    name = row["task"]["name"]
    return next(metric for metric in METRICS[name] if metric.title == HEADLINES[name])


def _overview(rows: Sequence[Row]) -> Overview:
    tasks = {repr(row["task"]): row for row in rows}
    methods = {repr(row["method"]): row for row in rows}
    found = {(repr(row["method"]), repr(row["task"])): headline(row).text(row) for row in rows}
    model = rows[0]["model"]
    return Overview(
        f"{model['name']}, {model['dtype']} on {model['device']}, seed {rows[0]['seed']}",
        [
            "method",
            f"bits at {LONG_CONTEXT // 1024}K",
            *(_column(row, list(tasks.values())) for row in tasks.values()),
        ],
        [
            [
                label(row),
                f"{bits_at(row, LONG_CONTEXT):.2f}",
                *(found.get((method, task), "-") for task in tasks),
            ]
            for method, row in methods.items()
        ],
    )


def _column(row: Row, rows: Sequence[Row]) -> str:
    """Task and metric, and the settings that tell this task from others of its name."""
    task = row["task"]
    others = [other["task"] for other in rows if other["task"]["name"] == task["name"]]
    apart = [
        f"{key}={value}"
        for key, value in task.items()
        if any(other.get(key) != value for other in others)
    ]
    metric = headline(row).title
    name = task["name"] if metric == task["name"] else f"{task['name']}: {metric}"
    return f"{name} ({', '.join(apart)})" if apart else name


def label(row: Row) -> str:
    """A contender's name, without what its whole suite shares."""
    name = row["method"]["name"].replace(f":{SAME_WINDOW}", "")
    if name == "ablation":
        return "compact"
    grid = name.startswith(PAPER_GRID)
    name = name.replace(PAPER_GRID, "paper's grid").removeprefix("ablation:").replace("@", " @")
    return name if grid else name.replace(",", ", ")


def bits_at(row: Row, tokens: int) -> float:
    """Bits per element that the same method comes to in a sequence of ``tokens`` tokens."""
    quantized = row["quantized_bits_per_element"]
    if quantized is None:
        return row["bits_per_element"]
    surplus = row["bits_per_element"] - quantized
    return quantized + surplus * row["cached_tokens"] / tokens


def write(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Writes ``report.html``, ``report.md`` and the pictures; returns what was written.

    Raises:
        ValueError: if matplotlib is missing, or the folder cannot be written.
    """
    try:
        from oscar_kv.evaluation.plots import pictures, save
    except ImportError as error:
        raise ValueError("report needs matplotlib: pip install 'oscar-kv[plot]'") from error
    written, body, pages = [], [], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for section in sections:
            pages.append(f"# {section.title}\n\n{section.markdown()}")
            body.append(f"<h2>{html.escape(section.title)}</h2>")
            body.append(f"<p class=note>{html.escape(section.provenance())}</p>")
            for number, table in enumerate(section.tables):
                body.append(table.html())
                for kind, figure in pictures(table):
                    name = f"{section.title}_{number}_{table.task['name']}_{kind}"
                    files = save(figure, folder / name)
                    drawn = files[-1].read_text(encoding="utf-8")
                    body.append(f"<figure>{drawn[drawn.index('<svg') :]}</figure>")
                    written += files
        for name, text in {
            "report.html": _PAGE.replace("BODY", "\n".join(body)),
            "report.md": "\n".join(pages),
        }.items():
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return written


def fill_page(page: Path, sections: Sequence[Section]) -> None:
    """Replaces what stands between ``<!-- results: TITLE -->`` and ``<!-- end -->`` in ``page``.

    Raises:
        ValueError: if the page has no place for a section, or cannot be read.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {str(page)!r}: {error.strerror}") from error
    for section in sections:
        place = re.compile(
            rf"(<!-- results: {re.escape(section.title)} -->\n).*?(<!-- end -->)", re.DOTALL
        )
        if not place.search(text):
            raise ValueError(f"{page}: expected <!-- results: {section.title} --> ... <!-- end -->")
        filled = f"\n{section.markdown()}\n"
        text = place.sub(lambda found, filled=filled: found[1] + filled + found[2], text)
    page.write_text(text, encoding="utf-8")


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>oscar-kv: evaluation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border-bottom: 1px solid #ccc; }
td:not(:first-child), th:not(:first-child) { text-align: right; } .note { color: #666; }
figure { margin: 1em 0; } svg { max-width: 100%; height: auto; }
</style>
<h1>What KV caches cost</h1>
<p class=note>Bits per element count everything that is stored, full-precision tokens included, at
the evaluated length and worked out for 32K tokens. A star: no other method does better with as few
bits.</p>
BODY
</html>
"""
