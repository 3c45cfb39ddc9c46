"""``oscar-kv diagnose`` as a command: of the demo, of a text, of pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import checkpoints
import pytest

from oscar_kv.cli import main
from oscar_kv.demo import MODEL


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def test_json_needs_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    assert run("diagnose", "--tokens", 400, "--out", out, "--json") == 0
    shown = capsys.readouterr()
    printed = json.loads(shown.out)
    assert (printed["model"], printed["tokens"]) == ("demo", 272)
    assert printed["presets"][0]["tokens"] == 128
    assert printed == json.loads((out / "diagnosis.json").read_text())
    assert shown.err == "no pictures: they need matplotlib, pip install 'oscar-kv[plot]'\n"
    assert {file.name for file in out.iterdir()} == {"diagnosis.json", "diagnosis.html"}


def test_command_with_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 60)
    args = ("diagnose", "--model", MODEL, "--out", tmp_path / "out", "--tokens", 400)
    assert run(*args, "--text", text) == 0
    shown = capsys.readouterr().out
    assert "Recommended: " in shown
    assert "+ token scaling" in shown
    assert (tmp_path / "out" / "norms.png").stat().st_size > 1000
    text.write_text("import os\n")
    assert run(*args, "--text", text) == 2
    assert "expected at least 384" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe\x00")
    assert run(*args, "--text", text) == 2
    assert run(*args, "--text", tmp_path / "none") == 2
    assert run("diagnose", "--model", tmp_path / "none") == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["cannot read" in line for line in errors] == [True, True, False]
    assert "cannot load" in errors[-1]


def test_command_with_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoints.llava()
    checkpoint.model.save_pretrained(tmp_path / "llava")
    checkpoint.processor.save_pretrained(tmp_path / "llava")
    text, picture = tmp_path / "text.txt", tmp_path / "picture.png"
    text.write_text("what do you see? " * 60)
    checkpoints.image("red").save(picture)
    args = ("diagnose", "--model", tmp_path / "llava", "--out", tmp_path / "out", "--text", text)
    pictures = ("--image", picture, "--image", picture)
    assert run(*args, *pictures, "--tokens", 290, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens_by_kind"]["image"] == 2 * 16
    assert printed["tokens_by_kind"]["text"] in (289, 290, 291)  # decoded and read again
    # the same through a chat template
    checkpoint.processor.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    )
    checkpoint.processor.save_pretrained(tmp_path / "llava")
    assert run(*args, *pictures, "--tokens", 290, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == printed["layers"]
    limit = checkpoint.model.config.text_config.max_position_embeddings
    text.write_text("what do you see? " * limit)
    assert run(*args, *pictures, "--tokens", limit) == 2
    assert f"this model takes {limit}" in capsys.readouterr().err
    assert run(*args, "--image", text) == 2
    assert "cannot identify" in capsys.readouterr().err
    assert run("diagnose", "--model", MODEL, "--image", picture) == 2
    assert "cannot load" in capsys.readouterr().err
