"""What a task is: it compares any number of caches on inputs that do not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from oscar_kv.evaluation.cache import Bits, Contender
from oscar_kv.evaluation.names import require_at_least
from oscar_kv.evaluation.subject import Subject

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
        """Raises ValueError if the text or the model's context is too short."""
        ...

    def run(
        self, subject: Subject, contenders: Iterable[Contender], seed: int, progress: Progress
    ) -> Iterator[Measured]:
        """One result per contender, as soon as it is known, from the same windows, drawn with
        ``seed`` if at random.

        What contenders have in common, the full cache's answers, is computed once as far as it can
        be kept (:class:`~oscar_kv.evaluation.reference.Reference`).
        """
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

    def __post_init__(self) -> None:
        require_at_least(1, windows=self.windows, length=self.length)

    @property
    def count(self) -> int:
        return self.windows

    def require(self, subject: Subject) -> None:
        subject.windows(self.windows, self.length)
        subject.require_context(self.length)


@dataclass(frozen=True, kw_only=True)
class Forced(Windowed):
    """Teacher-forced: a prompt, the rest of the window in steps over what a cache holds.

    Attributes:
        prefix: tokens of the prompt.
        step: tokens per forward pass; where ``prefix`` and ``step`` are multiples of 128 a step is
            what decoding token by token would be (:class:`~oscar_kv.evaluation.cache.MethodLayer`).
    """

    prefix: int
    step: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(3, length=self.length)
        require_at_least(1, prefix=self.prefix, step=self.step)
        if self.scored < 1:
            raise ValueError(
                f"prefix={self.prefix}: expected at most {self.length - 2}, with windows of "
                f"length={self.length}"
            )

    @property
    def scored(self) -> int:
        """Tokens of a window that are predicted behind the prompt."""
        return self.length - 1 - self.prefix
