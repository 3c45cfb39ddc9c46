"""Every task under its name."""

from __future__ import annotations

from oscar_kv.evaluation.names import parse_name, require_fields
from oscar_kv.evaluation.tasks.attention import AttentionError
from oscar_kv.evaluation.tasks.base import Measured, Task
from oscar_kv.evaluation.tasks.drift import Drift
from oscar_kv.evaluation.tasks.perplexity import Perplexity
from oscar_kv.evaluation.tasks.recall import Recall

TASKS: dict[str, type] = {
    "perplexity": Perplexity,
    "recall": Recall,
    "drift": Drift,
    "attention": AttentionError,
}


def task(name: str) -> Task:
    """The task called ``name``, see :func:`oscar_kv.evaluation.names.parse_name`.

    Raises:
        ValueError: for an unknown name, parameter or value.
    """
    base, parameters = parse_name(name)
    if base not in TASKS:
        raise ValueError(f"task {base!r}: expected one of {', '.join(TASKS)}")
    try:
        require_fields(TASKS[base], parameters)
        return TASKS[base](**parameters)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error


__all__ = ["TASKS", "AttentionError", "Drift", "Measured", "Perplexity", "Recall", "Task", "task"]
