"""An offloaded cache gives a model the same results as a resident one, in every kind of use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import offload_pairs
import pytest
import torch
from families import FAMILIES, left_padded, teacher_forced, tokens
from offload_pairs import LAYERS, llama, packed_kv, pair, pools
from transformers import AutoModelForCausalLM

from oscar_kv import OscarCache, OscarConfig, load_cache, save_cache
from oscar_kv.generation import can_be_captured
from oscar_kv.storage import offload
from oscar_kv.storage.offload import OffloadedPool, Staging

_poison = offload_pairs.poison  # a fixture of every test here

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["oscar", "sdpa"])
@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_the_same_logits(device: str, attention: str, preset: str) -> None:
    model = copy.deepcopy(llama()).to(device)
    model.set_attn_implementation(attention)
    ids, chunks = tokens(2, 812).to(device), [300, 1, 5, 200, 1, 5, 300]
    offloaded, resident = pair(model, OscarConfig.preset(preset))
    found = teacher_forced(model, ids, chunks, offloaded)
    assert torch.equal(found, teacher_forced(model, ids, chunks, resident))
    assert all(type(pool) is OffloadedPool for pool in pools(offloaded))
    assert offloaded.packed_layers()[0].device.type == device


def test_left_padding_and_single_steps() -> None:
    model = llama()
    ids, mask = left_padded(tokens(3, 390), [0, 7, 150])
    chunks = [378, *[1] * 12]
    offloaded, resident = pair(model)
    found = teacher_forced(model, ids, chunks, offloaded, mask)
    assert torch.equal(found, teacher_forced(model, ids, chunks, resident, mask))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 4},  # rolls back
        {"prefill_chunk_size": 100},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_generate(options: dict[str, Any]) -> None:
    model = llama()
    ids = tokens(1, 500)
    made = []
    for cache in pair(model):
        torch.manual_seed(3)
        made.append(model.generate(ids, past_key_values=cache, max_new_tokens=30, **options))
    assert made[0].tolist() == made[1].tolist()


@pytest.mark.parametrize("name", ["Gemma3Text", "Gemma4Text"])
def test_layers_of_other_kinds(name: str) -> None:
    """Sliding windows stay on the device; the last layers of Gemma 4 read those of earlier ones."""
    more = {"num_hidden_layers": 10, "layer_types": ["sliding_attention", "full_attention"] * 5}
    family = FAMILIES[name]
    config = replace(family, overrides={**family.overrides, **more}).config()
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("oscar")
    ids, chunks = tokens(2, 520), [300, 1, 5, 208, 6]
    offloaded, resident = pair(model)
    found = teacher_forced(model, ids, chunks, offloaded)
    assert torch.equal(found, teacher_forced(model, ids, chunks, resident))


@torch.no_grad()
def test_states_in_use_outlive_the_buffer_they_were_in() -> None:
    """The first layer's, read after all others have passed through both buffers."""
    found = []
    for cache in pair(llama()):
        torch.manual_seed(7)
        held = []
        for length in (600, 1):
            new = [torch.randn(2, 2, length, 32) for _ in range(LAYERS)]
            held = [cache.update(states, -states, layer) for layer, states in enumerate(new)]
        found.append([states.clone() for states in held[0]])
    for offloaded, resident in zip(*found):
        assert torch.equal(offloaded, resident)


CHANGES: dict[str, Callable[[OscarCache], None]] = {
    "crop": lambda cache: cache.crop(-3),
    "crop into a page": lambda cache: cache.crop(-290),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),  # type: ignore[arg-type]
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_was_changed_goes_on(change: str) -> None:
    """What follows writes pages, some of which take the place of others."""
    model = llama()
    logits = []
    for cache in pair(model):
        teacher_forced(model, tokens(2, 700), [600, 100], cache)
        CHANGES[change](cache)
        batch = 2 if change == "reset" else cache.packed_layers()[0].batch_size
        more = tokens(batch, 410, seed=5)
        logits.append(teacher_forced(model, more, [1, 300, 1, 108], cache))
    assert torch.equal(*logits)


def test_a_copy_and_its_original_go_their_own_ways() -> None:
    model = llama()
    offloaded, resident = pair(model)
    for cache in (offloaded, resident):
        teacher_forced(model, tokens(1, 300), [300], cache)
    # Room for a page of the tokens in the tail, and for one that will differ.
    assert pools(offloaded)[0].capacity == pools(offloaded)[0].used + 2
    copied = copy.deepcopy(offloaded)
    expected = copy.deepcopy(resident)
    for seed in (1, 2):
        for one, other in ((offloaded, resident), (copied, expected)):
            ids = tokens(1, 300, seed=seed if one is copied else seed + 7)
            found = teacher_forced(model, ids, [150, 1, 149], one)
            assert torch.equal(found, teacher_forced(model, ids, [150, 1, 149], other))
    assert copied.staging is not None
    assert {pool.staging for pool in pools(copied)} == set(copied.staging.values())
    assert not set(pools(copied)) & set(pools(offloaded))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_files(device: str, saved: bool, loaded: bool, tmp_path: Path) -> None:
    model, path = llama(device), tmp_path / "prompt.safetensors"
    ids, more = tokens(2, 600).to(device), tokens(2, 300, seed=1).to(device)
    cache = OscarCache(model.config, offloading=saved)
    teacher_forced(model, ids, [600], cache)
    save_cache(cache, path, model)
    again = load_cache(path, model, offloading=loaded)
    assert again.offloading == loaded
    assert (again.host_nbytes > 0) == loaded
    found = teacher_forced(model, more, [1, 299], again)
    assert torch.equal(found, teacher_forced(model, more, [1, 299], cache))
    if again.staging is not None:
        assert {pool.staging for pool in pools(again)} == set(again.staging.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [0, 600])
def test_pickles(device: str, length: int) -> None:
    """As a process hands a cache to another one: nothing is shared, whatever both append."""
    model = llama(device)
    cache = OscarCache(model.config, offloading=True)
    if length:
        teacher_forced(model, tokens(2, length).to(device), [length], cache)
    again = pickle.loads(pickle.dumps(cache))
    assert again.host_nbytes == cache.host_nbytes
    more = tokens(2, 300, seed=1).to(device)
    found, expected = (teacher_forced(model, more, [150, 1, 149], c) for c in (cache, again))
    assert torch.equal(found, expected)
    assert {pool.staging for pool in pools(again)} == set(again.staging.values())


FAULTS = {
    "more CPU memory": (OffloadedPool, "_extend"),
    "a larger buffer": (offload._Buffer, "make_room"),
    "copying to the device": (OffloadedPool, "load_into"),
    "copying back": (OffloadedPool, "store"),
}


@torch.no_grad()
@pytest.mark.parametrize("where", FAULTS)
@pytest.mark.parametrize("length", [0, 300])
def test_a_failed_pass_can_be_repeated(
    where: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out at some layer; what earlier ones have stored is taken back."""
    model = llama()
    ids = tokens(2, length + 420)
    offloaded, resident = pair(model)
    for cache in (offloaded, resident):
        if length:
            teacher_forced(model, ids[:, :length], [length], cache)
    owner, name = FAULTS[where]
    real, calls = getattr(owner, name), []

    def third_time(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("injected")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, third_time)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, length:], past_key_values=offloaded)
    assert offloaded.get_seq_length() == length
    found, expected = (
        model(ids[:, length:], past_key_values=cache).logits for cache in (offloaded, resident)
    )
    # Taken back is what was new; what it has pushed out of the first layers' tails stays packed.
    tolerance = 0.05 if length else 0.0
    assert torch.linalg.vector_norm(found - expected) <= tolerance * expected.norm()


def test_what_needs_resident_pages_is_refused() -> None:
    model = llama()
    cache = OscarCache(model.config, offloading=True, max_tokens=1000)
    teacher_forced(model, tokens(1, 20), [20], cache)
    assert all(pool.capacity >= 5 for pool in pools(cache))
    with pytest.raises(ValueError, match="pages are offloaded"):
        cache.reserve(100)
    assert not can_be_captured(model, cache)
    with pytest.raises(ValueError, match="staging is on cpu: this cache is on meta"):
        packed_kv(Staging("cpu"), device="meta")
