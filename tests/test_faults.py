"""Memory that runs out while tokens are stored: nothing has changed, the step can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from states import states
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oscar_kv import OscarCache, OscarConfig, PackedKV, quantize
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


class Interrupted(TorchDispatchMode):
    """Ctrl-C in place of operation number ``at``, counted from zero."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


KEYS, VALUES = states("gaussian", 2, 2, 700, 32)


def part(begin: int, end: int) -> tuple[Tensor, Tensor]:
    return KEYS[:, :, begin:end], VALUES[:, :, begin:end]


CHANGES: dict[str, Callable[[PackedKV], Any]] = {
    "a step": lambda packed: append(packed, *part(383, 384)),
    "a step of one sequence": lambda packed: append(packed, *part(383, 384), lengths=[0, 1]),
    "a chunk": lambda packed: append(packed, *part(383, 600), lengths=[217, 3]),
    "crop": lambda packed: packed.crop([140, 0]),
    "crop of the latest append": lambda packed: packed.crop([200, 0]),
    "select": lambda packed: packed.select([1, 1, 0]),
}


def everything(packed: PackedKV) -> list[Any]:
    """What there is to know of a batch, on the host and on the device."""
    return [
        packed.lengths,
        packed.pages_per_sequence,
        packed.pool.used,
        *(x.tolist() for x in (packed.page_counts, packed.tail_lengths, packed.sink_lengths)),
        *(x.tolist() for x in packed.dense()),
    ]


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_interrupted_anywhere_has_happened_or_has_not(change: str, sinks: int) -> None:
    """At many operations of torch, all of the last among them; and what comes next is right."""

    def fresh() -> PackedKV:
        packed = quantize(*part(0, 200), OscarConfig(sink_tokens=sinks), lengths=[200, 0])
        append(packed, *part(200, 383), lengths=[183, 143])
        return packed

    before, after = (fresh() for _ in range(2))
    CHANGES[change](after)
    kept, changed = everything(before), everything(after)
    for one in (before, after):
        append(one, *(x.repeat(2, 1, 1, 1)[: one.batch_size] for x in part(600, 700)))
    kept_next, changed_next = everything(before), everything(after)
    packed = fresh()
    with Interrupted(-1) as counter:
        CHANGES[change](packed)
    count = -counter.left
    assert count > 3
    outcomes = set()
    for at in {*range(0, count, 1 + count // 20), *range(max(0, count - 20), count)}:
        packed = fresh()
        with pytest.raises(KeyboardInterrupt), Interrupted(at):
            CHANGES[change](packed)
        found = everything(packed)
        assert found in (kept, changed), at
        append(packed, *(x.repeat(2, 1, 1, 1)[: packed.batch_size] for x in part(600, 700)))
        assert everything(packed) == (kept_next if found == kept else changed_next), at
        outcomes.add(found == kept)
    assert True in outcomes


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
