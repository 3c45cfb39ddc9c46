"""The attention function over one layer's states: what it honours, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_checks import CHUNK, HEAD_DIM, HEADS, filled_layer, states
from torch import Tensor

from oscar_kv import OscarConfig
from oscar_kv.integrations.attention_function import oscar_attention_forward
from oscar_kv.integrations.layer import OscarLayer


def attend(key: Tensor, value: Tensor, queries: int = 1, **arguments: Any) -> Tensor:
    """The attention function on random queries, two heads per KV head."""
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(2, 2 * HEADS, queries, HEAD_DIM, generator=generator)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    arguments = {"attention_mask": None, **arguments}
    out, weights = oscar_attention_forward(module, query, key, value, **arguments)  # type: ignore[arg-type]
    assert weights is None
    return out


def test_states_that_a_model_has_changed_are_honoured() -> None:
    keys, values = filled_layer().update(*states(5, seed=1))
    doubled = attend(keys, values * 2, queries=5)
    assert torch.allclose(doubled, 2 * attend(keys, values, queries=5), atol=1e-5)
    # Keys and values of two different layers.
    _, others = filled_layer(seed=7).update(*states(5, seed=8))
    mixed = attend(keys, others, queries=5)
    assert torch.allclose(mixed, attend(keys.clone(), others.clone(), queries=5), atol=1e-5)


@pytest.mark.parametrize("new", [20, CHUNK])
def test_fewer_queries_than_new_tokens(new: int) -> None:
    """Layers that share keys may compute only the last tokens of a prompt."""
    keys, values = filled_layer(380).update(*states(new, seed=1))
    few = attend(keys, values, queries=3)
    assert torch.allclose(few, attend(keys.clone(), values.clone(), queries=3), atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"softcap": 5.0}, {"s_aux": torch.tensor([0.5, 1, 2, 3])}])
def test_bidirectional_attention_sees_everything(extra: dict[str, Any]) -> None:
    """Without a mask, and from a module or call that says it is not causal."""
    keys, values = filled_layer().update(*states(4, seed=1))
    everything = torch.ones(1, 1, 4, 304, dtype=torch.bool)
    for key, value in ((keys, values), (keys.clone(), values.clone())):
        free = attend(key, value, queries=4, is_causal=False, **extra)
        masked = attend(key, value, queries=4, attention_mask=everything, **extra)
        causal = attend(key, value, queries=4, **extra)
        assert torch.allclose(free, masked, atol=1e-5)
        assert not torch.allclose(free, causal, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_position_bias_is_added_to_logits(masked: bool) -> None:
    """Packed attention of a bias equals scaled-dot-product attention over the same states."""
    keys, values = filled_layer().update(*states(4, seed=1))
    mask = torch.ones(1, 1, 4, 304, dtype=torch.bool).tril(300) if masked else None
    bias = torch.randn(1, 4, 4, 304)
    plain = attend(keys.clone(), values.clone(), 4, attention_mask=mask, position_bias=bias)
    packed = attend(keys, values, 4, attention_mask=mask, position_bias=bias)
    assert torch.allclose(packed, plain, atol=1e-4)
    assert not torch.allclose(packed, attend(keys, values, 4, attention_mask=mask), atol=1e-2)


@pytest.mark.parametrize("prompt", [0, 300])
def test_an_unchecked_nan_token_poisons_no_other(prompt: int) -> None:
    """As a first prompt, and as a chunk that is attended exactly."""
    layer = OscarLayer(OscarConfig(check_finite=False))
    if prompt:
        layer.update(*states(prompt))
    keys, values = states(500, seed=1)
    keys[0, 1, 450, 3] = torch.nan
    held = layer.update(keys, values)
    query = torch.randn(2, HEADS, 500, HEAD_DIM)
    out, _ = oscar_attention_forward(torch.nn.Module(), query, *held, None)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 0.1),
        ("indices", torch.zeros(1, 1, 4, dtype=torch.int64)),
        ("block_indices", torch.zeros(1, 1, 4, dtype=torch.int64)),
    ],
)
def test_what_cannot_be_honoured_raises(name: str, value: Any) -> None:
    keys, values = filled_layer().update(*states(1, seed=1))
    with pytest.raises(ValueError, match=name):
        attend(keys, values, **{name: value})


def test_sparse_selection_raises_with_any_cache() -> None:
    with pytest.raises(ValueError, match="indices"):
        attend(*states(10), indices=torch.zeros(1, 1, 4, dtype=torch.int64))
