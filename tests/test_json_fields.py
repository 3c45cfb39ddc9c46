"""The fields of ``--json`` are those that the tutorial lists (of ``demo``: `test_cli.py`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from oscar_kv.cli import main
from oscar_kv.demo import MODEL

PAGE = (Path(__file__).parents[1] / "docs" / "text.md").read_text(encoding="utf-8")


def documented(command: str) -> set[str]:
    """First column of the table below ``oscar-kv COMMAND --json``."""
    _, found, rest = PAGE.partition(f"`oscar-kv {command} --json`:\n\n")
    assert found
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall("`(.*?)`", row.split("|")[1])}


def fields(result: Any, prefix: str = "") -> set[str]:
    """Names of all plain values, those of objects in a list as ``list[].name``."""
    if isinstance(result, dict):
        dotted = prefix and f"{prefix}."
        return set().union(*(fields(value, dotted + name) for name, value in result.items()))
    if isinstance(result, list):
        assert result
        return set().union(*(fields(value, f"{prefix}[]") for value in result))
    return {prefix}


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "--model", str(MODEL), "--prompt", "a", "--max-new-tokens", "1"),
        ("info", "--model", str(MODEL)),
    ],
    ids=lambda args: args[0],
)
def test_documented_and_printed(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*args, "--json"])
    assert not end.value.code
    assert fields(json.loads(capsys.readouterr().out)) == documented(args[0])
