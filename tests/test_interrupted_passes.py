"""A pass that fails, or has not come to its end, halfway through the layers of a cache."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, teacher_forced, tokens
from support import tiny_model
from torch import Tensor

from oscar_kv.integrations.transformers import OscarCache


def test_a_pass_that_fails_in_a_hybrid_model_asks_for_a_reset() -> None:
    model = copy.deepcopy(FAMILIES["Gemma3Text"].model("oscar"))
    cache = OscarCache(model.config)
    weight = model.model.layers[1].self_attn.k_proj.weight
    kept = weight.data.clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN, Inf"):
        teacher_forced(model, tokens(1, 20), [20], cache)
    weight.data = kept
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        teacher_forced(model, tokens(1, 20), [20], cache)
    cache.reset()
    fresh = teacher_forced(model, tokens(1, 20), [20], OscarCache(model.config))
    assert torch.equal(teacher_forced(model, tokens(1, 20), [20], cache), fresh)


def test_a_layer_for_pictures_stays_empty_amid_a_pass() -> None:
    """Transformers 5.17 asks it whether there are any."""
    model = tiny_model("MllamaForConditionalGeneration", text_config={"num_hidden_layers": 3})
    text = model.config.text_config
    channels = text.hidden_size // text.num_attention_heads
    states = torch.randn(1, text.num_key_value_heads, 1, channels)
    cache = OscarCache(model.config)
    for layer in (0, 2, 0):
        cache.update(states, states, layer)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [1, 0, 1]


@torch.no_grad()
def test_a_pass_that_fails_between_two_updates_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = FAMILIES["Llama"].model("oscar")
    caches = [OscarCache(model.config) for _ in range(2)]
    length = 300
    ids = tokens(2, length + 90)
    for cache in caches:
        model(ids[:, :length], past_key_values=cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].mlp, "forward", _no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, length : length + 7], past_key_values=caches[0])
    found, expected = (model(ids[:, length:], past_key_values=cache).logits for cache in caches)
    assert torch.equal(found, expected)


def _no_memory(states: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("injected")


@torch.no_grad()
def test_two_threads_in_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is told; the first one does not notice."""
    model = FAMILIES["Llama"].model("oscar")
    ids = tokens(2, 400)
    expected = model(ids, past_key_values=OscarCache(model.config)).logits
    cache, other = OscarCache(model.config), copy.deepcopy(model)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    with ThreadPoolExecutor(1) as pool:

        def intruded(states: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="another thread is in the middle"):
                pool.submit(other, ids, past_key_values=cache).result()
            return forward(states)

        monkeypatch.setattr(mlp, "forward", intruded)
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)
        assert cache.get_seq_length() == 400
        # between two passes another thread may go on
        pool.submit(other, ids[:, :1], past_key_values=cache).result()
        assert cache.get_seq_length() == 401


@pytest.mark.parametrize("layer", [0, 1])
def test_non_finite_prompt_leaves_the_cache_as_it_was(layer: int) -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar"))
    cache = OscarCache(model.config)
    ids = tokens(1, 310)
    teacher_forced(model, ids[:, :300], [300], cache)
    weight = model.model.layers[layer].self_attn.k_proj.weight
    kept = weight.data.clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN, Inf"):
        teacher_forced(model, ids[:, 300:], [10], cache)
    weight.data = kept
    assert [cache.get_seq_length(index) for index in range(len(cache))] == [300, 300]
    again = teacher_forced(model, ids[:, 300:], [10], cache)
    fresh = teacher_forced(model, ids, [300, 10], OscarCache(model.config))
    assert torch.equal(again, fresh[:, 300:])
