"""Methods x tasks on a model, one JSON line per result; what is in the file is not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oscar_kv.evaluation.cache import contender, describe
from oscar_kv.evaluation.environment import environment
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.tasks import Task

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is still to be done for one task."""

    task: Task
    names: list[str]
    """Of the contenders without a row."""

    @property
    def steps(self) -> int:
        """How far :func:`run` counts."""
        return self.task.count * len(self.names)


def plan(
    subject: Subject, tasks: Sequence[Task], names: Sequence[str], seed: int, done: set[str]
) -> list[Plan]:
    """The tasks that are left, each with the contenders that ``done`` (keys of rows) lacks.

    Raises:
        ValueError: for an unknown contender, or text that a task cannot use.
    """
    left = []
    for task in tasks:
        task.require(subject)
        keys = {name: key_of(_what(subject, task, name, seed)) for name in names}
        left.append(Plan(task, [name for name in names if keys[name] not in done]))
    return [one for one in left if one.names]


def run(
    subject: Subject,
    plans: Sequence[Plan],
    seed: int,
    progress: Callable[[int, int], None] = lambda number, steps: None,
) -> Iterator[Row]:
    """Runs what is planned; yields the rows of a task when it is finished.

    All contenders of a task run window by window side by side: what they share, the prompt and
    the full cache's answers, is computed once.

    Args:
        subject: model and text.
        plans: from :func:`plan`.
        seed: of whatever a task draws at random.
        progress: called with the number of a plan, and how many steps of it were just done.
    """
    config = subject.model.config
    names = dict.fromkeys(name for one in plans for name in one.names)
    made = {
        name: contender(name, config, lambda: subject.calibration, subject.sensitivity)
        for name in names
    }
    for number, one in enumerate(plans):
        contenders = [made[name] for name in one.names]

        def advance(steps: int, number: int = number) -> None:
            progress(number, steps)

        measured = one.task.run(subject, contenders, seed, advance)
        for each, found in zip(contenders, measured):
            what = _what(subject, one.task, each.name, seed)
            yield {
                "key": key_of(what),
                **what,
                "bits_per_element": found.bits.all,
                "quantized_bits_per_element": found.bits.quantized,
                "cached_tokens": found.bits.length,
                **({"better_layers": each.better_layers} if each.better_layers else {}),
                "result": found.result,
                "environment": environment(),
            }


def key_of(what: Row) -> str:
    """Names a row by everything that decides its result but versions and hardware."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file.

    A last line that was cut off when a run was killed is left out.

    Raises:
        ValueError: if the file holds something else.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
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
    """Adds a row to a file, after whole lines only."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _what(subject: Subject, task: Task, name: str, seed: int) -> Row:
    described: Any = task  # a dataclass, which a protocol cannot say
    described = dataclasses.asdict(described)
    return {
        "model": subject.identity,
        "task": {"name": task.name, **json.loads(json.dumps(described))},
        "method": {"name": name, **describe(name)},
        "seed": seed,
    }
