"""The cache that applies a method: chunks are what single steps are, and inputs are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from oscar_kv.config import OscarConfig
from oscar_kv.evaluation.cache import MethodCache, bits_of, contender, describe
from oscar_kv.evaluation.capture import capture
from oscar_kv.evaluation.methods import FP8, KIVI, METHODS, Method, Oscar, QuaRot, view
from oscar_kv.evaluation.methods.base import Quantized
from oscar_kv.evaluation.teacher import fill, forced, read_prompt
from oscar_kv.integrations.transformers import OscarCache


def _model(layers: int) -> Any:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=97, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # wide, so that attention is far from uniform
            parameter.data.normal_(std=0.6 * parameter.shape[-1] ** -0.5)
    model.set_attn_implementation("oscar")
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return _model(layers=2)


@pytest.fixture(scope="module")
def one_layer() -> Any:
    """What its states are does not depend on what a cache gave attention before."""
    return _model(layers=1)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(97, (2, 513), generator=torch.Generator().manual_seed(2))


def logits_of(model: Any, tokens: Tensor, cache: Any, begin: int, step: int) -> Tensor:
    prompt = DynamicCache(config=model.config)
    read_prompt(model, tokens[:, :begin], prompt)
    steps = forced(model, tokens, fill(cache, prompt), begin, step)
    return torch.cat([logits for logits, _ in steps], 1)


@pytest.mark.parametrize(
    "method",
    [
        Oscar(config=OscarConfig.compact()),
        Oscar(config=OscarConfig.paper()),
        KIVI(),
        FP8(),
        QuaRot(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_chunk_is_as_many_single_steps(one_layer: Any, tokens: Tensor, method: Method) -> None:
    chunked = logits_of(one_layer, tokens, MethodCache(one_layer.config, [method]), 256, 128)
    single = logits_of(one_layer, tokens, MethodCache(one_layer.config, [method]), 256, 1)
    # The last token of a block completes it: alone, it sees that block quantized.
    same = torch.arange(256) % 128 != 127
    assert same.sum() == 254
    torch.testing.assert_close(chunked[:, same], single[:, same], rtol=1e-4, atol=1e-4)


def test_a_chunk_of_a_sliding_window_lies_between_its_ends(model: Any, tokens: Tensor) -> None:
    """A window over single tokens cannot be met by one view per chunk: the middle one is taken."""
    method = QuaRot(recent_tokens=64)
    cache = MethodCache(model.config, [method])
    logits_of(model, tokens, cache, 256, 128)
    layers: list[Any] = cache.layers
    assert [layer.quantized for layer in layers] == [384 + 64 - 64] * 2


@pytest.mark.parametrize("preset", ["compact", "paper", "high"])
def test_ours_is_what_the_real_cache_does(one_layer: Any, tokens: Tensor, preset: str) -> None:
    """Token by token, logits of the method and of OscarCache are the same."""
    config = OscarConfig.preset(preset)
    tokens = tokens[:, :420]
    cache = MethodCache(one_layer.config, [Oscar(config=config)])
    method = logits_of(one_layer, tokens, cache, 256, 1)
    packed = OscarCache(one_layer.config, config)
    real = logits_of(one_layer, tokens, packed, 256, 1)
    # A page that a token completes is read back at once, but for that very token.
    same = torch.tensor([(256 + i + 1) % 128 != 0 for i in range(real.shape[1])])
    torch.testing.assert_close(method[:, same], real[:, same], rtol=1e-3, atol=1e-3)
    assert bits_of(packed) == pytest.approx(bits_of(cache), rel=1e-6)


def test_a_prompt_gets_its_exact_self_back_and_is_left_alone(model: Any, tokens: Tensor) -> None:
    prompt, full = DynamicCache(config=model.config), DynamicCache(config=model.config)
    read_prompt(model, tokens[:, :256], prompt)
    read_prompt(model, tokens[:, :256], full)
    cache = fill(MethodCache(model.config, [QuaRot()]), prompt)
    list(forced(model, tokens, cache, 256, 64))
    layers: Any = zip(full.layers, prompt.layers)
    for before, after in layers:
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)


def test_a_layer_quantizes_every_token_once_and_shows_the_method_s_view(
    model: Any, tokens: Tensor
) -> None:
    """States of the first layer do not depend on the cache: its view is known."""
    method = KIVI(sink_tokens=4)
    cache = MethodCache(model.config, [method])
    logits_of(model, tokens, cache, 256, 32)
    states = capture(model, tokens[:, :512])[0]
    layer: Any = cache.layers[0]
    there = slice(layer.length)
    seen = view(method, states.keys[:, :, there], states.values[:, :, there])
    torch.testing.assert_close(layer.keys[:, :, there], seen.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.values[:, :, there], seen.values, rtol=1e-4, atol=1e-4)
    assert layer.length == 496
    assert bits_of(cache).all == pytest.approx(seen.bits_per_element)


def test_all_methods_get_the_same_states(model: Any, tokens: Tensor) -> None:
    """In the first layer, whatever the method: same tokens, same order, each once, no gaps."""

    class Recording(KIVI):
        def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
            calls.append((start, keys.clone(), values.clone()))
            return super().quantize(keys, values, start)

    seen = []
    for blocks in (32, 128):
        calls: list[tuple[int, Tensor, Tensor]] = []
        method = Recording(block_tokens=blocks)
        logits_of(model, tokens, MethodCache(model.config, [method, FP8()]), 256, 128)
        assert [start for start, _, _ in calls] == [
            sum(keys.shape[2] for _, keys, _ in calls[:i]) for i in range(len(calls))
        ]
        seen.append([torch.cat(parts, 2)[:, :, :384] for parts in list(zip(*calls))[1:]])
    for one, other in zip(*seen):
        assert torch.equal(one, other)


def test_captured_states_are_those_of_the_cache(model: Any, tokens: Tensor) -> None:
    full = DynamicCache(config=model.config)
    read_prompt(model, tokens[:, :100], full)
    before = model.config._attn_implementation
    states = capture(model, tokens[:, :100])
    assert model.config._attn_implementation == before
    layers: list[Any] = full.layers
    for found, layer in zip(states.values(), layers, strict=True):
        torch.testing.assert_close(found.keys, layer.keys)
        torch.testing.assert_close(found.values, layer.values)
        assert found.queries.shape == (2, 4, 100, 32)


def test_contenders(model: Any, tokens: Tensor) -> None:
    def calibration() -> list[Any]:
        return list(capture(model, tokens[:, :64]).values())

    names = [*METHODS, "full", "quality@cache", "compact:recent_tokens=0@cache", "mixed:layers=1"]
    for name in names:
        cache = contender(name, model.config, calibration, lambda one: [1, 2]).make_cache()
        logits_of(model, tokens[:, :280], cache, 256, 8)
    assert describe("kivi:group=16")["group"] == 16
    for name, message in {
        "tiny": "expected one of",
        "kivi@cache": "only the presets",
        "kivi:bit=2": r"unknown parameters \['bit'\]",
        "kivi:bits": "expected parameter=value",
        "compact:key_bits=5": "key_bits=5",
    }.items():
        with pytest.raises(ValueError, match=message):
            describe(name)
    with pytest.raises(ValueError, match="cannot be cropped"):
        MethodCache(model.config, [KIVI()]).crop(-1)
