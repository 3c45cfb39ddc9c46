"""What users of the command line type, paste, pipe in or name: texts and messages."""

from __future__ import annotations

import io
import select
import sys
from collections.abc import Callable
from pathlib import Path

WAIT = 0.05
"""Seconds in which the rest of a pasted block arrives."""


def read_text(path: str | Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: if it cannot be read, or is not UTF-8.
    """
    return _decoded(repr(str(path)), Path(path).read_bytes)


def read_standard_input() -> str:
    """All of standard input, UTF-8; raises as :func:`read_text` does."""
    return _decoded("standard input", sys.stdin.buffer.read)


def _decoded(name: str, read: Callable[[], bytes]) -> str:
    try:
        text = read().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text") from error
    return text.replace("\r\n", "\n")


class LineInput:
    """Reads messages from standard input.

    On a terminal, lines can be edited and called up again, and a pasted block is one message: GNU
    readline knows where it ends; without it, lines that arrive together are one. Elsewhere every
    line is a message.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()
        self._marks_blocks = self._terminal and _edit_lines()
        if not self._terminal and isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")

    def read(self) -> str | None:
        """The next message without white space around it, ``None`` after the last one."""
        try:
            lines = [input("> " if self._terminal else "")]
            while self._terminal and not self._marks_blocks and _more_has_arrived():
                lines.append(input())
        except EOFError:
            if self._terminal:
                print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return ""
        return "\n".join(lines).strip()


def _edit_lines() -> bool:
    """Switches on what the readline module offers; whether it tells pasted blocks from lines."""
    try:
        import readline
    except ImportError:  # not on every system
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True


def _more_has_arrived() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], WAIT)[0])
    except (OSError, ValueError):  # Windows selects among sockets alone
        return False
