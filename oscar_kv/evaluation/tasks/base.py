"""What a task is: it compares any number of caches on inputs that do not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from transformers import DynamicCache

from oscar_kv.evaluation.cache import Bits, Contender
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.teacher import read_prompt

Progress = Callable[[int], None]
"""Called with the number of (window, contender) pairs that are done."""


class Measured(NamedTuple):
    """What came out for one contender."""

    bits: Bits
    """Of its cache at the end of a window."""
    result: dict[str, Any]
    """Plain values."""


class Task(Protocol):
    """A frozen dataclass: its fields are its parameters."""

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int:
        """Windows, for a progress display."""
        ...

    def require(self, subject: Subject) -> None:
        """Raises ValueError if the text is too short."""
        ...

    def run(
        self, subject: Subject, contenders: Sequence[Contender], seed: int, progress: Progress
    ) -> list[Measured]:
        """One result per contender, from the same windows, drawn with ``seed`` if at random."""
        ...


@dataclass(frozen=True, kw_only=True)
class Windowed:
    """What tasks over windows of a text have in common.

    Attributes:
        windows: how many.
        length: tokens of a window.
    """

    windows: int
    length: int = 2048

    @property
    def count(self) -> int:
        return self.windows

    def require(self, subject: Subject) -> None:
        subject.windows(self.windows, self.length)


def exact_prompt(subject: Subject, tokens: Tensor) -> DynamicCache:
    """A full-precision cache that has read the prompt ``tokens``, for :func:`teacher.fill`."""
    cache = DynamicCache(config=subject.model.config)
    read_prompt(subject.model, tokens, cache)
    return cache
