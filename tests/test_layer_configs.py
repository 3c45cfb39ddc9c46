"""Layers of one cache with configs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tokens

from oscar_kv import OscarCache, OscarConfig, PackedKV, load_cache, save_cache

COMPACT, HIGH = OscarConfig.compact(), OscarConfig.high()
HIGH_SECOND = {1: HIGH}


@torch.no_grad()
@pytest.mark.parametrize("offloading", [False, True])
def test_each_layer_stores_what_a_cache_of_its_config_does(offloading: bool) -> None:
    model = FAMILIES["Llama"].model("oscar")
    mixed = OscarCache(model.config, layers=HIGH_SECOND, offloading=offloading)
    configs = (COMPACT, HIGH)
    alike = [OscarCache(model.config, config) for config in configs]
    states = [torch.randn(2, 2, 2, 400, model.config.head_dim) for _ in range(2)]
    for cache in (mixed, *alike):
        for layer, (keys, values) in enumerate(states):
            cache.update(keys, values, layer)
    for layer, (config, one) in enumerate(zip(configs, alike)):
        found, expected = (cache.packed_layers()[layer] for cache in (mixed, one))
        assert found.config == config
        assert _stored(found) == _stored(expected)
        for a, b in zip(found.dense(), expected.dense()):
            assert torch.equal(a, b)


def _stored(packed: PackedKV) -> dict[str, int]:
    return {kind: count for kind, count in packed.memory().items() if kind != "unused"}


@torch.no_grad()
def test_packed_attention_agrees_with_dequantized_states() -> None:
    """Over steps that complete pages, a rollback and a reordering."""
    logits = []
    for attention in ("oscar", "sdpa"):
        model = FAMILIES["Llama"].model(attention)
        cache = OscarCache(model.config, layers=HIGH_SECOND)
        model(tokens(2, 300), past_key_values=cache)
        model(tokens(2, 150, seed=1), past_key_values=cache)
        cache.crop(-30)
        cache.reorder_cache(torch.LongTensor([1, 0]))
        logits.append(model(tokens(2, 5, seed=2), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_file_keeps_them(tmp_path: Path) -> None:
    model = FAMILIES["Llama"].model("oscar")
    cache = OscarCache(model.config, layers=HIGH_SECOND)
    model(tokens(1, 400), past_key_values=cache)
    save_cache(cache, tmp_path / "cache.safetensors", model)
    loaded = load_cache(tmp_path / "cache.safetensors", model)
    assert [packed.config for packed in loaded.packed_layers()] == [COMPACT, HIGH]
    new = tokens(1, 9, seed=1)
    found, expected = (model(new, past_key_values=one).logits for one in (loaded, cache))
    assert torch.equal(found, expected)
    loaded.reset()
    model(new, past_key_values=loaded)
    assert [packed.config for packed in loaded.packed_layers()] == [COMPACT, HIGH]


def test_what_does_not_fit_is_refused() -> None:
    config = FAMILIES["Llama"].config()
    with pytest.raises(ValueError, match=r"layers=\[2\]: no full-attention layers of this model"):
        OscarCache(config, layers={2: HIGH})
    sliding = FAMILIES["Gemma3Text"].config()
    index = sliding.layer_types.index("sliding_attention")
    with pytest.raises(ValueError, match=rf"layers=\[{index}\]: no full-attention layers"):
        OscarCache(sliding, layers={index: HIGH})
    with pytest.raises(ValueError, match="recent_tokens=0, expected 128 as in other layers"):
        OscarCache(config, layers={1: OscarConfig(recent_tokens=0)})
    with pytest.raises(ValueError, match="sink_tokens=4, expected 0"):
        OscarCache(config, layers={1: OscarConfig(sink_tokens=4)})
    with pytest.raises(TypeError, match="config is a str: expected an OscarConfig"):
        OscarCache(config, layers={1: "high"})  # pyright: ignore[reportArgumentType]
