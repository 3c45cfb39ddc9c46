"""Saving and loading a whole cache."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tokens
from transformers import LlamaConfig

from oscar_kv import OscarCache, OscarConfig, load_cache, save_cache
from oscar_kv.integrations.layer import OscarLayer


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_a_loaded_cache_continues_as_the_saved_one(name: str, tmp_path: Path) -> None:
    """With quantized layers only, and with sliding-window layers between them."""
    model = FAMILIES[name].model("oscar")
    cache = OscarCache(model.config, OscarConfig.quality())
    model(tokens(2, 500), past_key_values=cache)
    save_cache(cache, tmp_path / "prompt.safetensors")
    loaded = load_cache(tmp_path / "prompt.safetensors", model.config)
    assert loaded.get_seq_length() == 500
    configs = [layer.config for layer in loaded.layers if isinstance(layer, OscarLayer)]
    assert set(configs) == {OscarConfig.quality()}
    for seed in range(3):
        new = tokens(2, 90, seed=seed)
        expected = model(new, past_key_values=cache).logits
        assert torch.equal(model(new, past_key_values=loaded).logits, expected)


@torch.no_grad()
def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    llama = FAMILIES["Llama"].model("oscar")
    with pytest.raises(ValueError, match="the cache is empty"):
        save_cache(OscarCache(llama.config), path)
    hybrid = next(family for family in FAMILIES.values() if family.has_recurrence)
    model = hybrid.model("oscar")
    cache = OscarCache(model.config)
    model(tokens(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be saved"):
        save_cache(cache, path)
    cache = OscarCache(llama.config)
    llama(tokens(1, 20), past_key_values=cache)
    save_cache(cache, path)
    others = {
        "model_type": FAMILIES["Gemma3Text"].config(),
        "num_hidden_layers": LlamaConfig(**{**llama.config.to_dict(), "num_hidden_layers": 3}),
        "num_key_value_heads": LlamaConfig(**{**llama.config.to_dict(), "num_key_value_heads": 4}),
        "head_dim": LlamaConfig(**{**llama.config.to_dict(), "head_dim": 64}),
    }
    for field, config in others.items():
        with pytest.raises(ValueError, match=f"made for a model with {field}="):
            load_cache(path, config)
    gemma = FAMILIES["Gemma3Text"].model("oscar")
    cache = OscarCache(gemma.config)
    gemma(tokens(1, 20), past_key_values=cache)
    save_cache(cache, path)
    config = copy.deepcopy(gemma.config)
    config.layer_types = config.layer_types[::-1]
    with pytest.raises(ValueError, match=r"holds quantized layers \['1'\]: this model has \['0'\]"):
        load_cache(path, config)


@torch.no_grad()
def test_a_model_in_another_dtype_is_told_when_it_uses_the_cache(tmp_path: Path) -> None:
    """No config says for sure what dtype a model runs in."""
    model = FAMILIES["Llama"].model("oscar")
    cache = OscarCache(model.config)
    model(tokens(1, 300), past_key_values=cache)
    save_cache(cache, tmp_path / "prompt.safetensors")
    loaded = load_cache(tmp_path / "prompt.safetensors", model.config)
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(
        TypeError, match=r"keys are torch\.bfloat16: this cache holds torch\.float32"
    ):
        half(tokens(1, 5), past_key_values=loaded)
    found, expected = (model(tokens(1, 5), past_key_values=c).logits for c in (loaded, cache))
    assert torch.equal(found, expected)
