"""Help of every command: nothing is cut off, and its examples parse."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

import oscar_kv
from oscar_kv.cli import COMMANDS, app, main

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line; returns exit code and stdout."""

    def call(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(list(args))
        captured = capsys.readouterr()
        assert captured.err == ""
        return int(exit_info.value.code or 0), captured.out

    return call


OURS = [name for name in COMMANDS if name != "lm-eval"]
"""Commands whose help is not that of another project."""


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_help_cuts_nothing_off(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out = run("-h")
    assert code == 0
    assert out == run("--help")[1]
    assert "..." not in out.replace("[ARGS]...", "")
    words = " ".join(out.split())
    for name, command in COMMANDS.items():
        summary = " ".join(inspect.cleandoc(command.__doc__ or "").partition("\n")[0].split())
        assert f"{name} {summary}" in words


@pytest.mark.parametrize("columns", [40, 60, 200])
@pytest.mark.parametrize("name", OURS)
def test_help_names_every_option_whole(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out = run(name, "-h")
    assert code == 0
    assert out == run(name, "--help")[1]
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", out))
    declared = get_command(app).commands[name].params  # pyright: ignore
    options = {option for one in declared if one.param_type_name == "option" for option in one.opts}
    assert options
    assert options <= shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in out


@pytest.mark.parametrize("name", ["demo", "generate", "chat", "info", "bench"])
def test_help_has_examples_that_parse(run: Run, name: str) -> None:
    _, out = run(name, "-h")
    examples = out.partition("Examples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    lines = [line.partition("oscar-kv ")[2] for line in examples.splitlines()]
    assert len(lines) >= 2
    for line in lines:
        given = shlex.split(re.sub(" [<>] .*", "", line))
        assert given[0] == name
        get_command(app).commands[name].make_context(name, given[1:])  # pyright: ignore


def test_version_and_module(run: Run) -> None:
    assert run("--version") == (0, f"oscar-kv {oscar_kv.__version__}\n")
    done = subprocess.run(
        [sys.executable, "-m", "oscar_kv", "--version"],
        cwd=Path(oscar_kv.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"oscar-kv {oscar_kv.__version__}\n"
