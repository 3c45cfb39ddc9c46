"""Memory that runs out while tokens are stored: nothing has changed, the step can be repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from states import states

from oscar_kv import OscarCache, OscarConfig, quantize
from oscar_kv.kernels import append, reference
from oscar_kv.storage import packed as packed_module
from oscar_kv.storage.pool import PagePool

WHERE = {
    "growing the pool": (PagePool, "_grow"),
    "packing a page": (reference, "pack_into"),
    "checking the states": (packed_module, "require_storable"),
    "widening the block table": (packed_module.PackedKV, "_widen_table"),
}


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("injected")


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSCAR_KV_BACKEND", "reference")


@pytest.mark.parametrize("where", WHERE)
def test_an_append_that_runs_out_of_memory_changes_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = states("gaussian", 2, 2, 1200, 64)
    begin, end = slice(0, 700), slice(700, 1200)
    packed, undisturbed = (
        quantize(keys[:, :, begin], values[:, :, begin], OscarConfig(), lengths=[700, 130])
        for _ in range(2)
    )
    used = packed.pool.used
    with monkeypatch.context() as patch:
        owner, name = WHERE[where]
        patch.setattr(owner, name, out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            append(packed, keys[:, :, end], values[:, :, end])
    assert packed.lengths == [700, 130]
    assert packed.pool.used == used
    for found, expected in zip(packed.dense(), undisturbed.dense()):
        assert torch.equal(found, expected)
    for one in (packed, undisturbed):
        append(one, keys[:, :, end], values[:, :, end])
    for found, expected in zip(packed.dense(), undisturbed.dense()):
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("length", [0, 300])
def test_a_model_goes_on_after_a_layer_has_run_out_of_memory(
    where: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second layer, so that the first one has stored the tokens already."""
    model = FAMILIES["Llama"].model("oscar")
    ids = tokens(2, length + 420)
    caches = [OscarCache(model.config) for _ in range(2)]
    if length:
        for cache in caches:
            model(ids[:, :length], past_key_values=cache)
    owner, name = WHERE[where]
    real, calls = getattr(owner, name), []

    def second_time(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return (out_of_memory if len(calls) == 2 else real)(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, second_time)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, length:], past_key_values=caches[0])
    found, expected = (model(ids[:, length:], past_key_values=cache).logits for cache in caches)
    assert torch.equal(found, expected)
    assert [packed.lengths for packed in caches[0].packed_layers()] == [[length + 420] * 2] * 2


@torch.no_grad()
def test_nan_in_one_sequence_leaves_the_others_alone() -> None:
    model = FAMILIES["Llama"].model("oscar")
    ids = tokens(3, 300)
    cache, clean = OscarCache(model.config), OscarCache(model.config)
    for one in (cache, clean):
        model(ids, past_key_values=one)
    poisoned = model.get_input_embeddings()(tokens(3, 5))
    poisoned[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN, Inf"):
        model(inputs_embeds=poisoned, past_key_values=cache)
    following = tokens(3, 7, seed=1)
    found, expected = (model(following, past_key_values=one).logits for one in (cache, clean))
    assert torch.equal(found, expected)
