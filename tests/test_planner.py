"""The planner's bytes against hand arithmetic and against caches of real models."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, each_family, tokens
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.config import PRESETS
from oscar_kv.generation import cache_nbytes
from oscar_kv.planner import GIB, ModelShape, plan
from oscar_kv.storage.layout import PageLayout

LLAMA = LlamaConfig(
    num_hidden_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)


def test_baselines_by_hand() -> None:
    shape = ModelShape.from_config(LLAMA)
    # 2 (K and V) x 32 layers x 8 heads x 128 channels x 2 bytes = 128 KiB a token
    assert shape.nbytes("bf16", 1) == 128 * 1024
    assert shape.nbytes("fp8", 1000, batch=3) == 3 * 1000 * 64 * 1024
    assert shape.max_context == 131072


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("context", [1, 127, 128, 255, 256, 257, 5000])
def test_presets_by_hand(preset: str, context: int) -> None:
    page = PageLayout(OscarConfig.preset(preset), 128, 8).page_bytes
    recent = 0 if preset == "paper" else 128
    pages = 0
    while context - 128 * pages >= recent + 128:
        pages += 1
    tail = (recent + 128) * 2 * 128 * 2
    assert ModelShape.from_config(LLAMA).nbytes(preset, context) == 32 * 8 * (pages * page + tail)


# the tiny models of these two carry fields that their configurations do not know
@each_family(*(name for name in FAMILIES if name not in ("GPT2", "GPTNeoX")))
def test_what_a_model_really_allocates(family: Family) -> None:
    model = copy.deepcopy(family.model("eager")).to(torch.bfloat16)
    ids = tokens(1, 400)
    full, packed = DynamicCache(config=model.config), OscarCache(model.config)
    with torch.no_grad():
        for cache in (full, packed):
            model(ids, past_key_values=cache, use_cache=True)
    shape = ModelShape.from_config(model.config)

    def planned(method: str) -> list[int]:
        # a windowed layer of Transformers keeps one token less than its window
        kept = [(replace(s, window=s.window and s.window - 1), n) for s, n in shape.layers]
        return sorted(s.nbytes(method, 400) for s, n in kept for _ in range(n))

    def used(layer: Any) -> int:
        if (pages := getattr(layer, "packed", None)) is not None:
            return pages.nbytes - pages.memory()["tables"]
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        return 0 if keys is None or values is None else keys.nbytes + values.nbytes

    for method, cache in (("bf16", full), ("compact", packed)):
        counted = sorted(filter(None, map(used, cache.layers)))
        assert planned(method) == counted
        assert shape.uncounted == len(cache.layers) - len(counted)
    assert cache_nbytes(full) >= sum(planned("bf16"))


@pytest.mark.parametrize(
    ("config", "heads", "channels"),
    [
        (GPT2Config(), 12, (64, 64)),
        (GPTNeoXConfig(), 64, (96, 96)),
        (Qwen2Config(num_key_value_heads=4), 4, (128, 128)),
        (FalconConfig(), 1, (64, 64)),  # multi-query
        (FalconConfig(new_decoder_architecture=True, num_kv_heads=8), 8, (64, 64)),
        (DeepseekV3Config(), 1, (512, 64)),  # a latent and a rotary key, whatever the heads
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_heads_of_published_configurations(
    config: PreTrainedConfig, heads: int, channels: tuple[int, int]
) -> None:
    ((layer, count),) = ModelShape.from_config(config).layers
    assert count == config.num_hidden_layers
    assert (layer.num_kv_heads, layer.head_dim, layer.value_head_dim) == (heads, *channels)


def test_windows_stop_growing_and_stay_in_bf16() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        sliding_window=1024, layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )  # fmt: skip
    shape = ModelShape.from_config(config)
    token = 4 * 2 * 256
    assert shape.nbytes("bf16", 10000) == 2 * token * (5 * 1024 + 10000)
    assert shape.nbytes("bf16", 500) == 2 * token * 6 * 500
    quantized = PageLayout(OscarConfig.compact(), 256, 4).page_bytes * 4 * ((10000 - 128) // 128)
    assert shape.nbytes("compact", 10000) == 2 * token * (5 * 1024 + 256) + quantized


@pytest.mark.parametrize("method", ["bf16", "fp8", *PRESETS])
@pytest.mark.parametrize("batch", [1, 7])
def test_longest_context_is_the_longest(method: str, batch: int) -> None:
    shape = ModelShape.from_config(LLAMA)
    longest = shape.longest_context(method, 10 * GIB, batch)
    assert shape.nbytes(method, longest, batch) <= 10 * GIB
    assert shape.nbytes(method, longest + 1, batch) > 10 * GIB


def test_nothing_fits() -> None:
    assert ModelShape.from_config(LLAMA).longest_context("compact", 1 << 20) == 0


def test_plan_compares_with_bf16() -> None:
    rows = {row.method: row for row in plan(ModelShape.from_config(LLAMA), 131072)}
    assert list(rows) == ["bf16", "fp8", *PRESETS]
    assert rows["fp8"].ratio == 2
    assert 7.0 < rows["compact"].ratio < 16 / 2.21875  # the tail costs something
    assert rows["compact"].bits_per_element == pytest.approx(16 / rows["compact"].ratio)
    assert rows["compact"].longest_context is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no full-attention layer"):
        ModelShape.from_config(MistralConfig(sliding_window=4096))
    shape = ModelShape.from_config(LLAMA)
    with pytest.raises(ValueError, match="context=0"):
        plan(shape, 0)
    with pytest.raises(ValueError, match="head_dim=12"):
        ModelShape.from_config(LlamaConfig(head_dim=12)).nbytes("compact", 10)
