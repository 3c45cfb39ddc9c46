"""Every Python block of README and docs runs, in the order of its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from oscar_kv.demo import MODEL
from oscar_kv.generation import load, quiet

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- needs a GPU -->\n)?```python\n(.*?)```", re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The code of a page, a blank line for every line before it, so that errors name the line."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text[: found.start(2)].count("\n") + found[2]
        for found in BLOCK.finditer(text)
        if not found[1] or torch.cuda.is_available()
    ]


PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if blocks(page)]


def test_pages_with_code_are_found() -> None:
    assert {"README.md", "prompts.md"} <= {page.name for page in PAGES}


@torch.no_grad()
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load(MODEL, "float32", device)
    inputs = loaded.tokenizer("import os", return_tensors="pt").to(device)
    given: dict[str, Any] = {
        "name": str(MODEL),
        "model": loaded.model,
        "tokenizer": loaded.tokenizer,
        "inputs": dict(inputs),
        "input_ids": inputs["input_ids"],
        "keys": torch.randn(1, 2, 300, 64),
        "values": torch.randn(1, 2, 300, 64),
        "query": torch.randn(1, 4, 1, 64),
    }
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), given)
