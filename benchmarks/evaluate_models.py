"""Every suite of ``oscar-kv eval`` on trained models, many methods at a time, within given minutes.

    python -m benchmarks.evaluate_models llama-39m qwen3-39m --minutes 8

For machines with GPUs, which one process with its small steps does not keep busy. The models are
folders that `tools/train_evaluation_model.py` has written. What is finished in time is in
``benchmarks/results/evaluation/MODEL_SUITE.jsonl``; the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.record import RESULTS
from oscar_kv.evaluation import cache, runner
from oscar_kv.evaluation.fit import fitting
from oscar_kv.evaluation.subject import Subject, rows_of_array
from oscar_kv.evaluation.suites import SUITES
from oscar_kv.evaluation.tasks import task

PERPLEXITY = "perplexity:windows=12,length=4096,prefix=2048,batch=12"
RECALL = "recall:lengths=[1024,2048,3584],trials=3"
TASKS = {
    "peers": (
        PERPLEXITY,
        RECALL,
        "recall:lengths=[2048],values=2,trials=4",
        "attention:windows=2,length=4096",
        "drift:windows=2",
    ),
    "same-window": (PERPLEXITY, RECALL),
    "ablation": (PERPLEXITY, RECALL),
}
DTYPE, SEED = "float32", 0


def text_of(model: Path) -> str:
    """What a model is tried on."""
    return f"{model / 'heldout.npz'}:text"


def command(model: Path, method: str, tasks: tuple[str, ...], device: str, out: Path) -> list[str]:
    """``oscar-kv eval`` of one method."""
    asked = [option for task in tasks for option in ("--task", task)]
    return [
        *(sys.executable, "-m", "oscar_kv.cli", "eval", "--model", str(model)),
        *("--tokens", text_of(model), "--dtype", DTYPE, "--seed", str(SEED), "--device", device),
        *("--method", method, "--out", str(out), *asked),
    ]


def result(out: Path, model: Path, suite: str) -> Path:
    """The file of a model and suite."""
    return out / f"{model.name}_{suite}.jsonl".replace("-", "_")


def unfinished(model: Path, device: str, out: Path) -> set[tuple[str, str]]:
    """Suites and methods that the model can have, and not yet a row of every task."""
    subject = Subject(model, rows_of_array(text_of(model)), dtype=DTYPE, device=device)
    left: set[tuple[str, str]] = set()
    for suite, names in SUITES.items():
        done = {row["key"] for row in runner.read_rows(result(out, model, suite))}
        tasks = [task(name) for name in TASKS[suite]]
        possible, _ = fitting(names, subject.model.config)
        plans = runner.plan(subject, tasks, possible, SEED, done)
        left.update((suite, cache.name_of(what)) for one in plans for what in one.left)
    return left


def collect(parts: list[Path], into: Path) -> int:
    """Adds the rows of ``parts`` that ``into`` lacks, in that order; how many there were."""
    known = {row["key"] for row in runner.read_rows(into)}
    rows = {row["key"]: row for part in parts for row in runner.read_rows(part)}
    new = [row for key, row in rows.items() if key not in known]
    for row in new:
        runner.append_row(into, row)
    return len(new)


def main(
    models: Annotated[list[Path], typer.Argument(help="Folders with a model and heldout.npz.")],
    minutes: Annotated[float, typer.Option(help="When to stop.")] = 30.0,
    processes: Annotated[int, typer.Option(min=1, help="At a time, on each GPU.")] = 6,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS / "evaluation",
) -> None:
    """Measure, and say how much was."""
    deadline = time.monotonic() + 60 * minutes
    gpus = torch.cuda.device_count()
    devices = [f"cuda:{number}" for number in range(gpus)] or ["cpu"]
    missing = {model: unfinished(model, devices[0], out) for model in models}
    waiting = [
        (model, suite, method)
        for suite, methods in SUITES.items()
        for method, model in itertools.product(methods, models)
        if (suite, method) in missing[model]
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if gpus else dict(os.environ)

    def run(number: int, part: Path) -> bool:
        """Whether there was nothing wrong, though it may not have finished."""
        model, suite, method = waiting[number]
        done = result(out, model, suite)
        part.write_bytes(done.read_bytes() if done.exists() else b"")
        asked = command(model, method, TASKS[suite], devices[number % len(devices)], part)
        left = deadline - time.monotonic()
        try:
            return left <= 0 or subprocess.run(asked, env=environment, timeout=left).returncode == 0
        except subprocess.TimeoutExpired:
            return True

    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{number}.jsonl" for number in range(len(waiting))]
        with ThreadPoolExecutor(processes * len(devices)) as pool:
            fine = list(pool.map(run, range(len(waiting)), parts))
        of_result: dict[Path, list[Path]] = {}
        for (model, suite, _), part in zip(waiting, parts):
            of_result.setdefault(result(out, model, suite), []).append(part)
        for done, files in of_result.items():
            print(f"{done}: {collect(files, done)} new results")
    if not all(fine):
        raise SystemExit(f"{fine.count(False)} of {len(fine)} runs failed: see above")


if __name__ == "__main__":
    typer.run(main)
