"""The scripts behind docs/recipes.md, with a model and data made here in the place of weights and
benchmarks: the last text command of the page, and the LLaVA one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness_tasks import RECALL, write_tasks
from picture_tasks import PICTURES, write_llava, write_picture_tasks

from oscar_kv.demo import MODEL

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text()


def command(pattern: str) -> list[str]:
    """The words of the last command of the page that matches."""
    found = re.findall(rf"^(?:\w+=\S+ )?(benchmarks/recipes/{pattern}.*)$", PAGE, re.MULTILINE)
    return shlex.split(found[-1])


def run(words: list[str], folder: Path, cache: str) -> Path:
    """Runs a recipe with one cache; returns the file of its results."""
    environment = {
        **os.environ,
        "ARGS": "device_map=cpu",  # read by lmms_eval.sh
        "CACHES": cache,
        "OUT": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (folder / cache).rglob("*results*.json")
    return written


def test_text(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    script, _, _, *rest = command("lm_eval.sh")
    tasks = ["--include_path", str(write_tasks(tmp_path / "tasks", questions=1))]
    words = [script, str(MODEL), RECALL, *rest, *tasks, "--device", "cpu"]
    found = json.loads(run(words, tmp_path, "preset=quality").read_text())
    assert found["results"][RECALL]["exact_match,number"] == 1
    assert found["config"]["kv_cache"]["key_group"] == 32


def test_images(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    script, model, _, _, *rest = command("lmms_eval.sh oscar-llava")
    tasks = ["--include_path", str(write_picture_tasks(tmp_path / "tasks"))]
    _, _, llava = write_llava(tmp_path / "llava")
    words = [script, model, str(llava), PICTURES, *rest, *tasks, "--device", "cpu", "--limit", "1"]
    found = json.loads(run(words, tmp_path, "preset=compact").read_text())
    assert PICTURES in found["results"]
