"""What the command line says on stderr: lines, and progress where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn


def say(line: str) -> None:
    """Prints a line on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_display() -> Iterator[Progress]:
    """A progress display on stderr that leaves no trace, and none where that is no terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        yield progress


@contextlib.contextmanager
def loading(model: str | Path) -> Iterator[None]:
    """Shows that ``model`` is being loaded: for one of the hub, how far its downloads are."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    task = f"loading {model}"
    local = Path(model).expanduser().exists()
    if local or not sys.stderr.isatty() or HF_HUB_DISABLE_PROGRESS_BARS:
        with progress_display() as progress:
            progress.add_task(task, total=None)
            yield
        return
    say(task)
    enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()
