"""Training with a cache: right while it holds nothing yet, refused where it would be wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, each_family, tokens
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from oscar_kv import OscarCache, OscarConfig

IMPLEMENTATIONS = ["oscar", "sdpa", "eager"]


def loss_of(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits = model(ids, past_key_values=cache).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: Any, ids: Tensor, cache: Any) -> list[Tensor]:
    model.zero_grad()
    loss_of(model, ids, cache).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_family("Llama", "Gemma3Text", "Qwen3Next", "DeepseekV3")
def test_gradients_of_one_pass_are_right(family: Family, implementation: str) -> None:
    model = copy.deepcopy(family.model(implementation))
    ids = tokens(2, 290)
    wanted = gradients(model, ids, DynamicCache(config=model.config))
    found = gradients(model, ids, OscarCache(model.config))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert (one - other).norm() < 1e-4 * (1 + other.norm())


@pytest.mark.parametrize("prefix_learns", [False, True])
@pytest.mark.parametrize("length", [40, 290], ids=["exact prefix", "packed prefix"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_family("Llama", "Gemma3Text", "Qwen3Next", "DeepseekV3")
def test_gradients_through_a_cached_prefix_are_refused(
    family: Family, implementation: str, length: int, prefix_learns: bool
) -> None:
    model = copy.deepcopy(family.model(implementation))
    ids, cache = tokens(1, length + 9), OscarCache(model.config)
    with torch.set_grad_enabled(prefix_learns):
        model(ids[:, :length], past_key_values=cache)
    loss = loss_of(model, ids[:, length:], cache)
    with pytest.raises(RuntimeError, match="no gradient flows through a quantized cache"):
        loss.backward()
    # frozen weights need none, and nobody has to switch gradients off
    model.requires_grad_(False)
    assert not loss_of(model, ids[:, length:], cache).requires_grad


def test_gradients_around_tokens_stored_as_zeros_are_refused() -> None:
    """What is attended is then not what was given."""
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar"))
    cache = OscarCache(model.config, OscarConfig(check_finite=False))
    loss = loss_of(model, tokens(1, 30), cache)
    with pytest.raises(RuntimeError, match="no gradient"):
        loss.backward()


@each_family("Llama", "Gemma3Text", "GptOss", "Qwen3Next", "Lfm2")
def test_a_cache_filled_with_gradients_on_keeps_no_graph(family: Family) -> None:
    """It can be copied, and does not grow by what a backward pass would need."""
    if family.name == "Lfm2" and not hasattr(DynamicCache, "get_conv_state"):
        pytest.skip("this Transformers changes the state of a convolution unseen")
    model = family.model("oscar")
    cache = OscarCache(model.config)
    for part in tokens(1, 310).split([300, 9, 1], 1):
        model(part, past_key_values=cache)
    twin = copy.deepcopy(cache)
    held = [x for layer in cache.layers for x in vars(layer).values()]
    held += [x for states in held if isinstance(states, dict) for x in states.values()]
    assert not any(x.requires_grad for x in held if isinstance(x, Tensor))
    with torch.no_grad():
        one, other = (model(tokens(1, 3), past_key_values=c).logits for c in (cache, twin))
    assert torch.equal(one, other)
