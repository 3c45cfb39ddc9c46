"""``OscarCache`` as a whole: its rows, its memory, and no trace of it where nobody asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, teacher_forced, tokens
from transformers import DynamicCache, LlamaConfig

from oscar_kv import OscarConfig
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.transformers import OscarCache


def test_batch_rows_can_be_selected_between_steps() -> None:
    model = FAMILIES["Llama"].model("oscar")
    ids = tokens(3, 310)
    cache = OscarCache(model.config)
    teacher_forced(model, ids[:, :300], [300], cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    rows = ids[[2, 0]]
    continued = teacher_forced(model, rows[:, 300:], [1, 9], cache)
    fresh = teacher_forced(model, rows, [300, 1, 9], OscarCache(model.config))
    assert torch.allclose(continued, fresh[:, 300:], atol=1e-3)


def test_memory_counts_every_layer() -> None:
    model = FAMILIES["Gemma3Text"].model("oscar")
    cache = OscarCache(model.config)
    assert cache.nbytes == cache.memory()["other"] >= 0
    teacher_forced(model, tokens(1, 400), [400], cache)
    kinds = cache.memory()
    quantized = cache.layers[1]
    assert isinstance(quantized, OscarLayer)
    assert quantized.packed is not None
    sliding: Any = cache.layers[0]
    assert kinds["codes"] == quantized.packed.memory()["codes"] > 0
    assert kinds["other"] >= 2 * sliding.keys.nbytes > 0
    assert cache.nbytes == quantized.packed.nbytes + kinds["other"]


def test_memory_counts_convolution_states() -> None:
    cache = OscarCache(FAMILIES["Lfm2"].model("oscar").config)
    teacher_forced(FAMILIES["Lfm2"].model("oscar"), tokens(2, 10), [10], cache)
    layer: Any = cache.layers[0]
    assert cache.memory()["other"] == layer.conv_states[0].nbytes > 0


@pytest.mark.parametrize(
    ("preset", "length", "ratio"),
    [("compact", 1 << 15, 6.7), ("compact", 1 << 17, 7.1), ("paper", 1 << 15, 5.05)],
)
def test_memory_against_an_exact_cache(preset: str, length: int, ratio: float) -> None:
    """Everything allocated counts: the full-precision tail, tables, and room not yet used."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    cache = OscarCache(config, OscarConfig.preset(preset))
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(1, 1, 1 << 13, 128, generator=generator).bfloat16()
    for _ in range(length // chunk.shape[2]):
        cache.update(chunk, chunk, 0)
    cache.update(chunk[:, :, :90], chunk[:, :, :90], 0)
    exact = 2 * (length + 90) * chunk[0, 0, 0].nbytes
    assert exact / cache.nbytes >= ratio


def test_exact_caches_are_left_alone() -> None:
    """Importing the package changes nothing for those who do not ask for it."""
    model = FAMILIES["Llama"].model("sdpa")
    with torch.no_grad():
        cache = model(tokens(1, 50), use_cache=True).past_key_values
    assert type(cache) is DynamicCache
    assert not any(isinstance(layer, OscarLayer) for layer in cache.layers)
