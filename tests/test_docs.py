"""Every Python and shell block of README and docs runs, in the order of its page.

Except those under a comment that says what they need: ``<!-- needs ... -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import checkpoints
import omni
import pytest
import torch
from families import Family, each_family
from support import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from oscar_kv.demo import MODEL
from oscar_kv.generation import load, quiet

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- needs (.*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
SHELLS = ("bash", "sh")


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page, a blank line for every line before it, so that errors name the line."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text[: found.start(3)].count("\n") + found[3]
        for found in BLOCK.finditer(text)
        if found[2] in languages
        and (not found[1] or (found[1] == "a GPU" and torch.cuda.is_available()))
    ]


ALL_PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
PAGES = [page for page in ALL_PAGES if blocks(page, "python")]
SHELL_PAGES = [page for page in ALL_PAGES if blocks(page, *SHELLS)]


def test_pages_with_code_are_found() -> None:
    pages = {"README.md", "audio.md", "prompts.md", "text.md", "vision.md"}
    assert pages <= {page.name for page in PAGES}
    assert "README.md" in {page.name for page in SHELL_PAGES}
    for page in ALL_PAGES:
        languages = {found[2] for found in BLOCK.finditer(page.read_text(encoding="utf-8"))}
        assert languages <= {"python", *SHELLS, ""}  # without a name: an output, a formula


def given_text(folder: Path) -> dict[str, Any]:
    """What blocks of a page take as given: here the demo model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load(MODEL, "float32", device)
    inputs = loaded.tokenizer("import os", return_tensors="pt").to(device)
    return {
        "name": str(MODEL),
        "model": loaded.model,
        "tokenizer": loaded.tokenizer,
        "inputs": dict(inputs),
        "input_ids": inputs["input_ids"],
        "keys": torch.randn(1, 2, 300, 64),
        "values": torch.randn(1, 2, 300, 64),
        "query": torch.randn(1, 4, 1, 64),
    }


def given_images(folder: Path) -> dict[str, Any]:
    """Pictures, LLaVA in a folder, Qwen-VL."""
    for name, color in (("first", "red"), ("second", "blue")):
        checkpoints.image(color).save(folder / f"{name}.png")
    qwen = checkpoints.qwen_vl()
    return {
        "name": _saved(checkpoints.llava(), folder / "llava"),
        "qwen": _without_media_tokens(qwen),
        "qwen_processor": qwen.processor,
    }


def given_sounds(folder: Path) -> dict[str, Any]:
    """Qwen2-Audio in a folder, Whisper, Qwen-Omni."""
    whisper = checkpoints.whisper()
    speaking = tiny_model("Qwen3OmniMoeForConditionalGeneration")
    return {
        "name": _saved(checkpoints.qwen2_audio(), folder / "qwen2_audio"),
        "whisper": whisper.model,
        "whisper_processor": whisper.processor,
        "omni": speaking,
        "prompt": omni.prompt(speaking),
    }


def _saved(checkpoint: checkpoints.Checkpoint, folder: Path) -> str:
    _without_media_tokens(checkpoint).save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
    return str(folder)


def _without_media_tokens(checkpoint: checkpoints.Checkpoint) -> Any:
    """A model that, though random, never says the tokens that stand for images and sounds."""
    special = checkpoint.processor.tokenizer.all_special_ids
    checkpoint.model.generation_config.suppress_tokens = special
    return checkpoint.model


def given_a_question(folder: Path) -> dict[str, Any]:
    """Qwen2.5-VL and a long question about a picture."""
    qwen = checkpoints.qwen_vl()
    inputs = qwen.ask("what do you see? " * 60, checkpoints.image("red"))
    return {"model": qwen.model, "inputs": inputs}


GIVEN = {"diagnose.md": given_a_question, "vision.md": given_images, "audio.md": given_sounds}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user types it: gradients are on unless the code says otherwise."""
    monkeypatch.chdir(tmp_path)
    quiet()
    given = GIVEN.get(page.name, given_text)(tmp_path)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), given)


@each_family("Gemma3Text", "Llama4Text", "Qwen3Next", "Lfm2")
def test_prompts_with_hybrids(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models with sliding-window, chunked, linear-attention and convolutional layers."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = family.config()
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="oscar").eval()
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    page = ROOT / "docs" / "prompts.md"
    for code in blocks(page, "python"):
        refused = family.has_recurrence and "save_cache" in code  # as the page says
        with pytest.raises(ValueError, match="cannot be saved") if refused else nullcontext():
            exec(compile(code, str(page), "exec"), given)


@pytest.mark.parametrize("page", SHELL_PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "question.txt").write_text("import os\n" * 300)
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MODEL": str(MODEL),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for script in blocks(page, *SHELLS):
        subprocess.run(
            ["bash", "-euc", script],
            cwd=tmp_path,
            env=environment,
            check=True,
            stdin=subprocess.DEVNULL,
        )
