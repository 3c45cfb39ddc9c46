"""``oscar-kv eval | report``: what caches cost a model, measured and shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from oscar_kv.progress import progress_display


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a causal model. The bundled one if omitted.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Text never trained on, as FILE.npz:NAME: ids [N, T].")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="The same as a UTF-8 file.")] = None,
    row_length: Annotated[int, typer.Option(min=2, help="Tokens of a piece of --text.")] = 2048,
    suite: Annotated[str, typer.Option(help="peers, same-window or ablation.")] = "peers",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Instead of a suite: kivi, kivi:group=64, compact@cache ..."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="perplexity, recall:keys=1, drift, attention ...; repeatable."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="JSON lines; rows that it has are not run again.")
    ] = Path("results.jsonl"),
    seed: Annotated[int, typer.Option(help="Of what tasks draw at random.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Compare ways to quantize a KV cache on a model, and add the results to a file."""
    from transformers import AutoTokenizer

    from oscar_kv.demo import MODEL
    from oscar_kv.evaluation import runner
    from oscar_kv.evaluation.cache import full_layers
    from oscar_kv.evaluation.subject import Subject, rows_of_array, rows_of_text
    from oscar_kv.evaluation.suites import SUITES, for_model
    from oscar_kv.evaluation.tasks import TASKS
    from oscar_kv.evaluation.tasks import task as task_called
    from oscar_kv.generation import quiet

    quiet()
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r}: expected one of {tuple(SUITES)}")
    tasks = [task_called(name) for name in task or TASKS]
    if model is None and tokens is None and text is None:
        model, tokens = str(MODEL), f"{MODEL / 'heldout.npz'}:text"
    if model is None or (tokens is None) == (text is None):
        raise ValueError("expected --model and one of --tokens and --text, or none of them")
    done = {row["key"] for row in runner.read_rows(out)}
    with progress_display() as progress:
        progress.add_task(f"loading {model}", total=None)
        if text is not None:
            rows = rows_of_text(text, AutoTokenizer.from_pretrained(model), row_length)
        else:
            rows = rows_of_array(str(tokens))
        subject = Subject(model, rows, dtype=dtype, device=device)
    layers = len(full_layers(subject.model.config))
    names = list(dict.fromkeys(method or for_model(SUITES[suite], layers)))
    plans = runner.plan(subject, tasks, names, seed, done)
    written = 0
    with progress_display() as progress:
        bars = [progress.add_task(one.task.name, total=one.steps) for one in plans]
        for row in runner.run(
            subject, plans, seed, lambda number, steps: progress.advance(bars[number], steps)
        ):
            runner.append_row(out, row)
            written += 1
    there = len(tasks) * len(names) - written
    print(f"{out}: {written} results written, {there} were there", file=sys.stderr)


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that eval has written.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and pictures.")] = Path(
        "report"
    ),
    into: Annotated[
        Path | None, typer.Option(help="A Markdown page: fills its <!-- results: NAME --> parts.")
    ] = None,
) -> None:
    """Tables, plots and one self-contained HTML page of what eval has measured."""
    from oscar_kv.evaluation import report as reporting

    sections = [reporting.Section.read(path) for path in results]
    pictures = reporting.write(sections, out)
    if into is not None:
        reporting.fill_page(into, sections)
    for path in pictures:
        print(path)
