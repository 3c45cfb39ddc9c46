"""Saving and loading a whole cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tokens

from oscar_kv import OscarCache, OscarConfig, load_cache, save_cache


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
    assert loaded.config == cache.config
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
    other = FAMILIES["Gemma3Text"].model("oscar")
    with pytest.raises(ValueError, match=r"holds quantized layers \['0', '1'\]"):
        load_cache(path, other.config)
