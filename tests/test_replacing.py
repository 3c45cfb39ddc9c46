"""A file is replaced whole or stays as it was, whatever its name is and whatever goes wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oscar_kv import quantize
from oscar_kv.replacing import replacing
from oscar_kv.storage import files
from oscar_kv.storage.files import load_packed, read_about, save_packed

NAMES = (
    "talk",
    "talk.1",
    "two words",
    ".hidden",
    "naïve 会話",
    "a..b",
    "-",
    "x" * 255,
    "sub/../talk",
)


@pytest.mark.parametrize("name", NAMES)
def test_new_and_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / name
    for text in ("first", "second"):
        with replacing(path) as part:
            part.write_text(text)
        assert path.read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"sub", path.resolve().name})


def test_permissions_are_kept_and_else_those_of_a_new_file(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    path = tmp_path / "talk"
    for expected in (usual.stat().st_mode, 0o640):
        with replacing(path) as part:  # as a library does that makes files for itself alone
            part.unlink()
            os.close(os.open(part, os.O_CREAT, 0o600))
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(expected)
        path.chmod(0o640)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/talk")
    for text in ("first", "second"):
        with replacing(tmp_path / "link") as part:
            part.write_text(text)
        assert (tmp_path / "far" / "talk").read_text() == text
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_goes_wrong_leaves_the_earlier_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    path.write_text("earlier")

    def write() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error), match=r"cannot write .*talk': No space left|^$"):
        write()
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["talk"]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("nowhere/talk", FileNotFoundError, "there is no folder '.*nowhere'"),
        ("file/talk", FileNotFoundError, "there is no folder '.*file'"),
        ("folder", IsADirectoryError, "that is a folder"),
        ("talk/", IsADirectoryError, "that is a folder"),
        (".", IsADirectoryError, "that is a folder"),
        ("pipe", OSError, "no regular file"),
        ("device", OSError, "no regular file"),
        ("loop", OSError, "lead back to themselves"),
        ("locked", PermissionError, "read-only"),
        ("x" * 256, OSError, "File name too long"),
    ],
)
def test_no_place_for_a_file(name: str, error: type[OSError], says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("earlier")
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").write_text("earlier")
    (tmp_path / "locked").chmod(0o444)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/full")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=says), replacing(f"{tmp_path}/{name}") as part:
        part.write_text("new")
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "locked").read_text() == "earlier"
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_packed_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.safetensors"
    packed = quantize(torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64))
    save_packed(path, {"0": packed}, about={"turn": 1})

    def full(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise files.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write '.*cache\.safetensors': No space left"):
        save_packed(path, {"0": packed}, about={"turn": 2})
    assert load_packed(path).about == read_about(path) == {"turn": 1}
    assert os.listdir(tmp_path) == ["cache.safetensors"]


def test_only_what_was_packed_has_an_about(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_about(tmp_path / "none")
    (tmp_path / "text").write_text("{}")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_about(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "model"))
    with pytest.raises(ValueError, match="not an oscar-kv file"):
        read_about(tmp_path / "model")
    save_packed(tmp_path / "words", {}, about={"only": "words"})
    assert read_about(tmp_path / "words") == load_packed(tmp_path / "words").about
