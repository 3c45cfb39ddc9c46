"""Models and configs that ``OscarCache`` refuses, with an error that says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, Family, each_family, tokens
from transformers import LlamaConfig

from oscar_kv import OscarConfig
from oscar_kv.integrations.transformers import OscarCache


@pytest.mark.parametrize("wrong", [None, "llama", {"num_hidden_layers": 2}, torch.nn.Linear(2, 2)])
def test_model_config_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model_config"):
        OscarCache(wrong)


@pytest.mark.parametrize("wrong", ["compact", {"key_bits": 2}, OscarConfig, 2])
def test_config_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="config"):
        OscarCache(LlamaConfig(), wrong)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mistral", "FalconH1"])
def test_model_without_a_layer_to_quantize(name: str) -> None:
    fields = {"sliding_window": 64} if name == "Mistral" else {}
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=2, **fields)
    with pytest.raises(ValueError, match="no full-attention layer"):
        OscarCache(config)


@pytest.mark.parametrize("head_dim", [4, 12, 20])
@pytest.mark.parametrize("stated", [True, False])
def test_head_dim_without_a_layout(head_dim: int, stated: bool) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": 2 * head_dim}
    if stated:
        config: Any = LlamaConfig(**heads, head_dim=head_dim, num_hidden_layers=2)
    else:
        config = transformers.GPTNeoXConfig(**heads, num_hidden_layers=2)
    with pytest.raises(ValueError, match=str(head_dim)):
        OscarCache(config)


def test_float64_model() -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar")).double()
    with pytest.raises(TypeError, match="float64"):
        model(tokens(1, 8), past_key_values=OscarCache(FAMILIES["Llama"].config()))
    model.config.dtype = torch.float64
    with pytest.raises(TypeError, match="float64"):
        OscarCache(model.config)


def test_unknown_layer_type() -> None:
    config = FAMILIES["Gemma3Text"].config()
    config.layer_types = ["telepathy", "full_attention"]
    with pytest.raises(ValueError, match="unknown layer type 'telepathy'"):
        OscarCache(config)


def test_prefix_tuning_is_told_why_it_gets_no_cache() -> None:
    """PEFT reads this of a cache before it drops it."""
    cache = OscarCache(FAMILIES["Llama"].config())
    assert not hasattr(cache, "max_cache_len")
    with pytest.raises(AttributeError, match="prefix tuning"):
        _ = cache.max_cache_len


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": [1]}, TypeError, r"layers=\[1\]: expected a dict"),
        ({"layers": {1: "high"}}, TypeError, "config is a str"),
        ({"starts": [-1]}, ValueError, r"starts=\[-1\]"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        OscarCache(FAMILIES["Llama"].config(), **arguments)


@torch.no_grad()
def test_changes_that_cannot_be_made_are_named_and_change_nothing() -> None:
    model = FAMILIES["Llama"].model("oscar")
    cache = OscarCache(model.config)
    model(tokens(2, 300), past_key_values=cache)
    changes: list[tuple[str, Any, str]] = [
        ("crop", -400, r"crop\(-400\): there are 300 tokens"),
        ("crop", 5, r"crop\(5\): expected a negative number"),
        ("batch_repeat_interleave", 0, r"batch_repeat_interleave\(0\)"),
        ("batch_select_indices", [2], "out of bounds"),
        ("reorder_cache", torch.tensor([0, 2]), r"rows=\[0, 2\]"),
    ]
    for method, argument, message in changes:
        with pytest.raises((ValueError, IndexError), match=message):
            getattr(cache, method)(argument)
    assert cache.get_seq_length() == 300
    cache.batch_select_indices([1])  # pyright: ignore[reportArgumentType]  (as DynamicCache)
    assert model(tokens(1, 1), past_key_values=cache).logits.shape[0] == 1


@torch.no_grad()
@each_family("Gemma3Text", "GptOss", "Qwen3Next", "Lfm2", "Llama4Text")
def test_what_a_hybrid_refuses_leaves_every_layer_as_it_was(family: Family) -> None:
    model, ids = family.model("oscar"), tokens(2, 70)
    cache, untouched = (OscarCache(model.config) for _ in range(2))
    for one in (cache, untouched):
        model(ids[:, :60], past_key_values=one)
    with pytest.raises((ValueError, RuntimeError)):
        cache.crop(-5)  # beyond the window, or of a recurrence
    if family.has_recurrence:
        with pytest.raises(ValueError, match="batch_repeat_interleave"):
            cache.batch_repeat_interleave(2)
    found, wanted = (model(ids[:, 60:], past_key_values=one).logits for one in (cache, untouched))
    assert torch.equal(found, wanted)
