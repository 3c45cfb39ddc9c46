"""``oscar-kv eval | report``: what caches cost a model, measured and shown."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from oscar_kv.progress import progress_display

if TYPE_CHECKING:
    from oscar_kv.evaluation.runner import Plan, Row

SECONDS_BETWEEN_LINES = 60.0
UNBOUNDED = 1000
"""Columns of a file or a pipe, which is as wide as a table needs."""


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a causal model. The bundled one if omitted.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Text never trained on, as FILE.npz:NAME: ids [N, T].")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="The same as a UTF-8 file, which is cut into rows.")
    ] = None,
    row_length: Annotated[int, typer.Option(min=2, help="Tokens of a row of --text.")] = 2048,
    suite: Annotated[str, typer.Option(help="peers, same-window or ablation.")] = "peers",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of a suite, repeatable: full, fp8, fp8-token, int4, kivi, ott, quarot, "
            "rotatekv, turboquant-2, turboquant-2.5, turboquant-3, kvarn, kitty, oscar-eigen, "
            "paper, compact, quality, high, ablation or mixed; with parameters, kivi:group=64; a "
            "preset's real cache, compact@cache; or module:Class of your own."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="perplexity, recall, drift or attention, all if omitted; with parameters, "
            "recall:keys=1; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="JSON lines; rows that it has are not run again.")
    ] = Path("results.jsonl"),
    seed: Annotated[int, typer.Option(help="Of what tasks draw at random.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Compare ways to quantize a KV cache on a model, and add the results to a file.

    Examples:

    \b
      oscar-kv eval --method full --method compact --task perplexity:windows=2
      oscar-kv eval --model MODEL --text heldout.txt --row-length 4096
          --task perplexity:windows=16,length=4096,prefix=2048
      oscar-kv eval --method full --method mine:Rounded:bits=3

    The last compares with a class in mine.py of the current folder.
    """
    from oscar_kv.demo import MODEL
    from oscar_kv.evaluation import runner
    from oscar_kv.evaluation.cache import resolve
    from oscar_kv.evaluation.fit import fitting
    from oscar_kv.evaluation.names import parse_name
    from oscar_kv.evaluation.subject import Subject, source
    from oscar_kv.evaluation.suites import SUITES
    from oscar_kv.evaluation.tasks import TASKS
    from oscar_kv.evaluation.tasks import task as task_called
    from oscar_kv.generation import quiet

    quiet()
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r}: expected one of {', '.join(SUITES)}")
    if any(":" in parse_name(name)[0] for name in method or ()):
        sys.path.append(os.getcwd())
    for name in method or ():
        resolve(name)
    tasks = [task_called(name) for name in task or TASKS]
    if model is None and tokens is None and text is None:
        model, tokens = str(MODEL), f"{MODEL / 'heldout.npz'}:text"
    if model is None or (tokens is None) == (text is None):
        raise ValueError("expected --model and one of --tokens and --text, or none of them")
    rows = source(text, tokens)
    done = runner.results_in(out)
    with progress_display() as progress:
        progress.add_task(f"loading {model}", total=None)
        subject = Subject(model, rows, row_length=row_length, dtype=dtype, device=device)
    if method is None:
        method, wrong = fitting(SUITES[suite], subject.model.config)
        for why in wrong:
            print(f"left out: {why}", file=sys.stderr)
    plans = runner.plan(subject, tasks, method, seed, done)
    with progress_display() as progress:
        watch = Watch(plans, progress)
        for row in runner.run(subject, plans, seed, watch.advance):
            runner.append_row(out, row)
            done[row["key"]] = row
            watch.add(row)
    shown = runner.rows_of(plans, done)
    written = sum(len(one.left) for one in plans)
    print(f"{out}: {written} results written, {len(shown) - written} were there", file=sys.stderr)
    _print_overviews(shown)


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that eval has written.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and pictures.")] = Path(
        "report"
    ),
    into: Annotated[
        Path | None, typer.Option(help="A Markdown page: fills its <!-- results: NAME --> parts.")
    ] = None,
) -> None:
    """Tables, plots and one self-contained HTML page of what eval has measured.

    Examples:

    \b
      oscar-kv report results.jsonl
      oscar-kv report small.jsonl large.jsonl --out both
    """
    from oscar_kv.evaluation import report as reporting

    sections = [reporting.Section.read(path) for path in results]
    for section in sections:
        _print_overviews([row for table in section.tables for row in table.rows])
    pictures = reporting.write(sections, out)
    if into is not None:
        reporting.fill_page(into, sections)
    for path in pictures:
        print(path)


class Watch:
    """What is said on stderr during a run: every result, and how far it is.

    That is a bar per task on a terminal; elsewhere a line a minute.
    """

    def __init__(self, plans: Sequence[Plan], progress: Progress) -> None:
        self._names = [one.task.name for one in plans]
        self._steps = sum(one.steps for one in plans)
        self._results = sum(len(one.left) for one in plans)
        self._progress = progress
        self._bars = [progress.add_task(one.task.name, total=one.steps) for one in plans]
        self._stepped = self._added = 0
        self._begin = self._said = time.monotonic()

    def advance(self, number: int, steps: int) -> None:
        """So many more of the steps of a plan are done."""
        self._stepped += steps
        self._progress.advance(self._bars[number], steps)
        silent = time.monotonic() - self._said
        if self._progress.disable and silent >= SECONDS_BETWEEN_LINES:
            self._say(f"{self._names[number]}: {self._stepped} of {self._steps} steps")

    def add(self, row: Row) -> None:
        """A result is there."""
        from oscar_kv.evaluation.report import headline, label

        self._added += 1
        metric = headline(row)
        self._say(
            f"{row['task']['name']}, {label(row)}: {metric.title} {metric.text(row)} at "
            f"{row['bits_per_element']:.2f} bits; {self._added} of {self._results} results"
        )

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        per_step = (self._said - self._begin) / max(self._stepped, 1)
        if left := self._steps - self._stepped:
            line += f", about {in_words(per_step * left)} left"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


def in_words(seconds: float) -> str:
    """A duration, in the two units that say enough."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _print_overviews(rows: Sequence[Row]) -> None:
    from oscar_kv.evaluation.report import overviews

    for one in overviews(rows):
        table = Table(title=one.title, title_justify="left", box=box.SIMPLE)
        for number, name in enumerate(one.header):
            table.add_column(name, justify="right" if number else "left")
        for cells in one.cells:
            table.add_row(*cells)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = UNBOUNDED
        console.print(table)
