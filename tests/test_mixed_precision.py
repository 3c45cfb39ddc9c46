"""Keys and values of more than one dtype: autocast over a float32 model, a model that is moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, each_family, tokens
from states import states
from torch import Tensor
from transformers import DynamicCache

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.integrations.layer import OscarLayer

EXACT = OscarConfig(recent_tokens=512)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["oscar", "eager"])
@each_family()
def test_autocast_over_a_float32_model(
    family: Family, implementation: str, dtype: torch.dtype
) -> None:
    """As Transformers' own cache, and packed pages do not notice."""
    model, ids = family.model(implementation), tokens(2, 310)
    logits = []
    for cache in (
        DynamicCache(config=model.config),
        OscarCache(model.config, EXACT),
        OscarCache(model.config),
    ):
        with torch.autocast("cpu", dtype=dtype):
            parts = [model(x, past_key_values=cache).logits for x in ids.split([300, 1, 9], 1)]
        logits.append(torch.cat(parts, 1).float())
    wanted, exact, quantized = logits
    assert (exact - wanted).abs().max() < 0.1 * wanted.std()
    correlation = torch.corrcoef(torch.stack([quantized.flatten(), wanted.flatten()]))[0, 1]
    assert correlation > 0.95


def test_pages_packed_under_autocast_are_the_same() -> None:
    keys, values = states("gaussian", 2, 2, 700, 64)
    layers = []
    for enabled in (False, True):
        layer: Any = OscarLayer(OscarConfig(recent_tokens=0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            layer.update(keys[:, :, :300], values[:, :, :300])
            layer.update(keys[:, :, 300:], values[:, :, 300:])
            layer.crop(-130)
            layers.append((layer.packed.pool.data.clone(), layer.keys.clone()))
    for one, other in zip(*layers):
        assert torch.equal(one, other)


def narrowed(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys, values = states("gaussian", 1, 2, 40, 32)
    return keys.to(dtype), values.to(dtype)


@pytest.mark.parametrize("length", [0, 300])
def test_a_layer_holds_the_widest_dtype_it_was_given(length: int) -> None:
    """And returns every state in the dtype of the new ones."""
    half, bfloat16, single = (
        narrowed(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)
    )
    for first, then, held in (
        (bfloat16, single, torch.float32),
        (single, bfloat16, torch.float32),
        (half, bfloat16, torch.float32),
        (half, half, torch.float16),
        ((single[0], half[1]), (half[0], bfloat16[1]), torch.float32),
    ):
        layer: Any = OscarLayer(EXACT)
        given = layer.update(*(x.repeat(1, 1, 1 + length // 40, 1) for x in first))
        assert [x.dtype for x in given] == [x.dtype for x in first]
        before = [x.clone() for x in (layer.keys, layer.values)]
        returned = layer.update(*then)
        assert [x.dtype for x in returned] == [x.dtype for x in then]
        assert layer.dtype == held
        for found, old, new in zip((layer.keys, layer.values), before, then):
            assert torch.equal(found.clone(), torch.cat([old.to(held), new.to(held)], 2))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["oscar", "sdpa"])
def test_a_model_that_is_moved_to_another_dtype(implementation: str) -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model(implementation))
    ids, cache = tokens(1, 320), OscarCache(model.config, EXACT)
    wanted = model(ids, use_cache=False).logits[:, 300:]
    model(ids[:, :300], past_key_values=cache)
    found = model.bfloat16()(ids[:, 300:310], past_key_values=cache).logits
    assert found.dtype == torch.bfloat16
    assert (found - wanted[:, :10]).abs().max() < 0.2 * wanted.std()
    found = model.float()(ids[:, 310:], past_key_values=cache).logits
    assert (found - wanted[:, 10:]).abs().max() < 0.2 * wanted.std()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float64])
@pytest.mark.parametrize("length", [0, 40])
def test_what_is_no_dtype_of_states_is_named(dtype: torch.dtype, length: int) -> None:
    layer = OscarLayer(EXACT)
    if length:
        layer.update(*narrowed(torch.float32))
    with pytest.raises(TypeError, match=str(dtype).replace(".", r"\.")):
        layer.update(*narrowed(dtype))
    assert layer.get_seq_length() == length
    assert not length or layer.dtype == torch.float32
