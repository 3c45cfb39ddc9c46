"""Methods x tasks on a model, one JSON line per result; what is in the file is not run again."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oscar_kv.evaluation.cache import Contender, contender, describe, name_of, resolve
from oscar_kv.evaluation.environment import environment
from oscar_kv.evaluation.fit import require_fit
from oscar_kv.evaluation.methods import Method
from oscar_kv.evaluation.subject import ROW_LENGTH, Subject, read_text, source
from oscar_kv.evaluation.tasks import TASKS, Task
from oscar_kv.evaluation.tasks import task as task_called

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One task, and what is still to be done for it."""

    task: Task
    keys: dict[str | Method, str]
    """Of the rows of every contender."""
    left: list[str | Method]
    """Contenders without a row."""

    @property
    def steps(self) -> int:
        """How far :func:`run` counts."""
        return self.task.count * len(self.left)


def plan(
    subject: Subject,
    tasks: Sequence[Task],
    methods: Sequence[str | Method],
    seed: int,
    done: Container[str],
) -> list[Plan]:
    """Every task, and the contenders of which ``done`` (keys of rows) has no row.

    Raises:
        ValueError: for a contender that is unknown or that the model cannot have, or text that a
            task cannot use.
    """
    plans, methods = [], list(dict.fromkeys(methods))
    for one in methods:
        require_fit(one, subject.model.config)
    for task in tasks:
        keys = {one: key_of(_what(subject, task, one, seed)) for one in methods}
        left = [one for one in methods if keys[one] not in done]
        if left:
            task.require(subject)
        plans.append(Plan(task, keys, left))
    return plans


def run(
    subject: Subject,
    plans: Sequence[Plan],
    seed: int,
    progress: Callable[[int, int], None] = lambda number, steps: None,
) -> Iterator[Row]:
    """Runs what is planned; yields each row as soon as it is known.

    Args:
        subject: model and text.
        plans: from :func:`plan`.
        seed: of whatever a task draws at random.
        progress: called with the number of a plan, and how many steps of it were just done.
    """

    @functools.cache
    def made(what: str | Method) -> Contender:
        return contender(
            what, subject.model.config, lambda: subject.calibration, subject.sensitivity
        )

    for number, one in enumerate(plans):
        measured = one.task.run(
            subject, map(made, one.left), seed, functools.partial(progress, number)
        )
        for what, found in zip(one.left, measured):
            better = made(what).better_layers
            yield {
                "key": one.keys[what],
                **_what(subject, one.task, what, seed),
                "bits_per_element": found.bits.all,
                "quantized_bits_per_element": found.bits.quantized,
                "cached_tokens": found.bits.length,
                **({"better_layers": better} if better else {}),
                "result": found.result,
                "environment": environment(),
            }


def evaluate(
    model: str | Path,
    methods: Sequence[str | Method],
    tasks: Sequence[str] = tuple(TASKS),
    *,
    text: str | Path | None = None,
    tokens: str | None = None,
    row_length: int = ROW_LENGTH,
    out: str | Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> list[Row]:
    """What ``oscar-kv eval`` does, from Python.

    Args:
        model: folder or id of a causal model.
        methods: names as ``--method`` takes them, or methods themselves.
        tasks: names as ``--task`` takes them.
        text: UTF-8 file that the model was never trained on, or `tokens`.
        tokens: the same as ``FILE.npz:NAME``, ids ``[N, T]``.
        row_length: tokens of a piece of `text`.
        out: JSON lines: rows that it has are not run again, the others are added one by one.
        seed: of what tasks draw at random.
        dtype: of the model; ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` ...

    Returns:
        A row for every task and method (docs/evaluation.md has their fields).

    Raises:
        ValueError: for an unknown name or value, a file that cannot be read or written, or text
            that is too short.
    """
    chosen = [task_called(name) for name in tasks]
    for one in methods:
        resolve(one)
    rows = source(text, tokens)
    done = {} if out is None else results_in(Path(out))
    subject = Subject(model, rows, row_length=row_length, dtype=dtype, device=device)
    plans = plan(subject, chosen, methods, seed, done)
    for row in run(subject, plans, seed):
        done[row["key"]] = row
        if out is not None:
            append_row(Path(out), row)
    return rows_of(plans, done)


def rows_of(plans: Sequence[Plan], done: Mapping[str, Row]) -> list[Row]:
    """What is known of what was planned, from rows by their keys."""
    return [done[key] for one in plans for key in one.keys.values() if key in done]


def key_of(what: Row) -> str:
    """Names a row by everything that decides its result but versions and hardware."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def results_in(path: Path) -> dict[str, Row]:
    """The rows of a file by their keys; none if there is no file yet.

    Raises:
        ValueError: if rows cannot be added to it: it is not a file, holds something else, or
            cannot be written.
    """
    rows = {row["key"]: row for row in read_rows(path)}
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file.

    A last line that was cut off when a machine went down is left out.

    Raises:
        ValueError: if the file holds something else.
    """
    if not path.exists():
        return []
    *lines, tail = read_text(path).split("\n")
    if tail and not _is_torn(tail):
        lines.append(tail)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not {"key", "model", "task", "method", "result"} <= row.keys():
                raise ValueError("fields are missing")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a result row ({error})") from error
        rows.append(row)
    return rows


def append_row(path: Path, row: Row) -> None:
    """Adds a row to a file, after whole lines only, or leaves the file as it was.

    Raises:
        ValueError: if it cannot be written.
    """
    line = (json.dumps(row) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            file.seek(0)
            there = file.readall()
            end = there.rfind(b"\n") + 1
            if _is_torn(there[end:].decode()):
                file.truncate(end)
            else:
                end = len(there)
                line = b"\n" + line if there and there[-1:] != b"\n" else line
            if file.write(line) < len(line):  # a full disk takes a part
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _is_torn(tail: str) -> bool:
    """Whether what stands behind the last end of a line is a part of a row."""
    begin = '{"key": '
    if not tail or tail[: len(begin)] != begin[: len(tail)]:
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


def _what(subject: Subject, task: Task, what: str | Method, seed: int) -> Row:
    described: Any = task  # a dataclass, which a protocol cannot say
    described = dataclasses.asdict(described)
    return {
        "model": subject.identity,
        "task": {"name": task.name, **json.loads(json.dumps(described))},
        "method": {"name": name_of(what), **describe(what)},
        "seed": seed,
    }
