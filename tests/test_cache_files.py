"""Saving and loading a whole cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from support import oscar_cache, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from oscar_kv import OscarCache, OscarConfig, load_cache, save_cache
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.storage.files import load_packed, save_packed


def filled(model: Any, length: int = 20) -> OscarCache:
    cache = OscarCache(model.config)
    model(tokens(1, length), past_key_values=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_a_loaded_cache_continues_as_the_saved_one(name: str, tmp_path: Path) -> None:
    """With quantized layers only, and with sliding-window layers between them."""
    model = FAMILIES[name].model("oscar")
    cache = OscarCache(model.config, OscarConfig.quality())
    model(tokens(2, 500), past_key_values=cache)
    save_cache(cache, tmp_path / "prompt.safetensors", model)
    loaded = load_cache(tmp_path / "prompt.safetensors", model)
    assert loaded.get_seq_length() == 500
    configs = [layer.config for layer in loaded.layers if isinstance(layer, OscarLayer)]
    assert set(configs) == {OscarConfig.quality()}
    for seed in range(3):
        new = tokens(2, 90, seed=seed)
        expected = model(new, past_key_values=cache).logits
        assert torch.equal(model(new, past_key_values=loaded).logits, expected)


@torch.no_grad()
def test_a_cache_of_fewer_layers_than_the_config_names(tmp_path: Path) -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar"))
    del model.model.layers[1]
    cache = filled(model, 300)
    save_cache(cache, tmp_path / "prompt.safetensors", model)
    layers: Any = load_cache(tmp_path / "prompt.safetensors", model).layers
    assert [layer.get_seq_length() for layer in layers] == [300, 0]


@torch.no_grad()
def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    llama = FAMILIES["Llama"].model("oscar")
    with pytest.raises(ValueError, match="the cache is empty"):
        save_cache(OscarCache(llama.config), path, llama)
    hybrid = next(family for family in FAMILIES.values() if family.has_recurrence)
    with pytest.raises(ValueError, match="cannot be saved"):
        save_cache(filled(hybrid.model("oscar")), path, hybrid.model("oscar"))
    other: Any
    for other in (DynamicCache(), oscar_cache(tiny_model("T5ForConditionalGeneration"))):
        with pytest.raises(TypeError, match=f"a {type(other).__name__}: only an OscarCache can"):
            save_cache(other, path, llama)
    with pytest.raises(TypeError, match="model is a LlamaConfig: expected the model"):
        save_cache(filled(llama), path, llama.config)
    with pytest.raises(ValueError, match="the cache made by a model with model_type=llama: this"):
        save_cache(filled(llama), path, FAMILIES["Qwen3"].model("oscar"))
    assert not list(tmp_path.iterdir())


def other_weights(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] += 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (other_weights, "other weights"),
        (lambda model: model.bfloat16(), "dtype=torch.float32: this one has torch.bfloat16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=10000.0"),
        ({"vocab_size": 120}, "vocab_size=97: this one has 120"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=2: this one has 3"),
        ({"head_dim": 64}, "head_dim=32: this one has 64"),
    ],
)
def test_a_file_of_another_model_is_refused(
    changed: Callable[[Any], None] | dict[str, Any], told: str, tmp_path: Path
) -> None:
    """More of what tells models apart is in ``test_fingerprint.py``."""
    model = FAMILIES["Llama"].model("oscar")
    path = tmp_path / "prompt.safetensors"
    save_cache(filled(model), path, model)
    if callable(changed):
        changed(other := copy.deepcopy(model))
    else:
        config = FAMILIES["Llama"].config()
        config.update(changed)
        other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"prompt.safetensors: made by a model with .*{told}"):
        load_cache(path, other)
    with pytest.raises(TypeError, match="model is a LlamaConfig: expected the model, not its"):
        load_cache(path, model.config)


@torch.no_grad()
def test_a_file_that_does_not_say_whose_it_is(tmp_path: Path) -> None:
    model = FAMILIES["Llama"].model("oscar")
    path = tmp_path / "prompt.safetensors"
    packed = filled(model).packed_layers()
    save_packed(path, {str(index): layer for index, layer in enumerate(packed)})
    with pytest.raises(ValueError, match="not written by save_cache"):
        load_cache(path, model)


@torch.no_grad()
def test_a_file_of_an_earlier_format(tmp_path: Path) -> None:
    """As version 3 was, which stated sizes alone."""
    model = FAMILIES["Llama"].model("oscar")
    path = tmp_path / "prompt.safetensors"
    save_cache(filled(model), path, model)
    with safe_open(str(path), framework="pt") as file:
        metadata, keys = file.metadata(), file.keys()
        tensors = {name: file.get_tensor(name) for name in keys}
    save_file(tensors, str(path), {**metadata, "version": "3"})
    with pytest.raises(ValueError, match="format version 3, expected 4: compute it again"):
        load_cache(path, model)
    save_cache(filled(model), path, model)  # which may be replaced
    load_cache(path, model)


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """No file may grow beyond ``nbytes``."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@torch.no_grad()
def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    model = FAMILIES["Llama"].model("oscar")
    path = tmp_path / "prompt.safetensors"
    save_cache(filled(model), path, model)
    before = path.read_bytes()
    with (
        full_disk(len(before)),
        pytest.raises(OSError, match=r"cannot write .*prompt\.safetensors"),
    ):
        save_cache(filled(model, 600), path, model)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@torch.no_grad()
def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    model = FAMILIES["Llama"].model("oscar")
    cache = filled(model)
    theirs = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, str(theirs))
    (tmp_path / "notes.txt").write_text("mine")
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    for place, error, told in (
        (tmp_path, IsADirectoryError, "that is a folder: add the name of a file"),
        (tmp_path / "no" / "such", FileNotFoundError, "there is no folder '.*no'"),
        (tmp_path / "notes.txt" / "a", FileNotFoundError, r"there is no folder '.*notes\.txt'"),
        (theirs, FileExistsError, "exists and is not an oscar-kv file: choose another name"),
        (tmp_path / "notes.txt", FileExistsError, "exists and is not an oscar-kv file"),
        ("/dev/null", OSError, "that is no regular file"),
        (tmp_path / ("a" * 300), OSError, "too long"),
    ):
        with pytest.raises(error, match=told):
            save_cache(cache, place, model)
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
        load_cache(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_cache(tmp_path / "no", model)


@torch.no_grad()
def test_a_link_stays_one(tmp_path: Path) -> None:
    model = FAMILIES["Llama"].model("oscar")
    (tmp_path / "link").symlink_to(tmp_path / "prompt.safetensors")
    save_cache(filled(model), tmp_path / "link", model)
    assert (tmp_path / "link").is_symlink()
    assert json.dumps(load_packed(tmp_path / "prompt.safetensors").about)
    load_cache(tmp_path / "link", model)
