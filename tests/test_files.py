"""Saving and loading packed sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from states import states
from test_packed import CONFIGS, assert_same

from oscar_kv import OscarConfig, quantize
from oscar_kv.storage import files
from oscar_kv.storage.files import load_packed, save_packed

KEYS, VALUES = states("gaussian", 3, 2, 600, 32)


@settings(max_examples=20)
@given(
    st.sampled_from(list(CONFIGS.values())),
    st.lists(st.integers(0, 600), min_size=3, max_size=3),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    config: OscarConfig,
    lengths: list[int],
    rows: list[int],
    dtype: torch.dtype,
) -> None:
    path = tmp_path_factory.mktemp("caches") / "cache.safetensors"
    packed = quantize(KEYS.to(dtype), VALUES.to(dtype), config, lengths=lengths)
    packed.select(rows)
    save_packed(
        path,
        {"0": packed, "1": quantize(KEYS, VALUES)},
        {"note": torch.arange(3)},
        {"by": "hand"},
    )
    caches, extra, about = load_packed(path)
    assert about == {"by": "hand"}
    assert torch.equal(extra["note"], torch.arange(3))
    assert_same(caches["1"], quantize(KEYS, VALUES))
    loaded = caches["0"]
    assert loaded.config == config
    assert loaded.dtype == dtype
    assert_same(loaded, packed)
    assert loaded.pool.used == packed.pool.used
    more = KEYS[: len(rows)].to(dtype), VALUES[: len(rows)].to(dtype)
    if len(rows) <= 3:
        for cache in (packed, loaded):
            cache.append(*more)
        assert_same(loaded, packed)


def test_only_pages_in_use_are_written(tmp_path: Path) -> None:
    packed = quantize(KEYS[:, :, :512], VALUES[:, :, :512], OscarConfig.paper())
    save_packed(tmp_path / "all", {"0": packed})
    packed.select([0, 0, 0])
    save_packed(tmp_path / "shared", {"0": packed})
    assert (tmp_path / "shared").stat().st_size < 0.4 * (tmp_path / "all").stat().st_size


def test_bad_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.safetensors"
    with pytest.raises(FileNotFoundError, match=r"cache\.safetensors"):
        load_packed(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_packed(path)
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="not an oscar-kv file"):
        load_packed(path)
    path.unlink()
    with pytest.raises(ValueError, match="expected at least one"):
        save_packed(path, {})
    monkeypatch.setattr(files, "FORMAT_VERSION", 99)
    save_packed(path, {"0": quantize(KEYS, VALUES)})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 99, expected 4: compute"):
        load_packed(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["0"].pop("config"),
        lambda d: d["0"].update(dtype="torch.int4"),
        lambda d: d["0"]["sequences"][0].update(sinks=9),
        lambda d: d["0"]["sequences"][0].update(tail=5000),
        lambda d: d["0"]["sequences"][0].update(pages=[-1]),
        lambda d: d["0"]["sequences"][0].update(pages=[99]),
        lambda d: d["0"].update(num_kv_heads=1),
        lambda d: d.update(other=d["0"]),
    ],
)
def test_a_damaged_description_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    path = tmp_path / "cache.safetensors"
    save_packed(path, {"0": quantize(KEYS, VALUES)})
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    described = json.loads(metadata["description"])
    damage(described["caches"])
    text = json.dumps(described)
    save_file(tensors, str(path), {**metadata, "description": text})
    with pytest.raises(ValueError, match="its checksum is not that of its contents"):
        load_packed(path)
    # and by someone who computes the checksum, too
    new = {"description": text, "checksum": files.checksum(text, tensors)}
    save_file(tensors, str(path), {**metadata, **new})
    with pytest.raises(ValueError, match=r"cache\.safetensors: damaged \((?!its checksum)"):
        load_packed(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    save_packed(path, {"0": quantize(KEYS, VALUES)})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_packed(path)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    save_packed(path, {"0": quantize(KEYS, VALUES)})
    whole = path.read_bytes()
    tensors = 8 + int.from_bytes(whole[:8], "little")
    for place in torch.linspace(tensors, len(whole) - 1, 9).long().tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="its checksum is not that of its contents"):
            load_packed(path)
    path.write_bytes(whole)
    load_packed(path)
