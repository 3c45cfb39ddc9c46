"""Offloaded pages: the same results as resident ones, whatever the staging buffers held before.

Whatever is not copied reads as NaN here: new CPU memory and a buffer that changes hands are filled
with 255, which is no number in FP8 and float16. Layers are more than there are buffers.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, left_padded, teacher_forced, tokens
from hypothesis import given
from hypothesis import strategies as st
from states import states
from torch import Tensor
from transformers import AutoModelForCausalLM

from oscar_kv import OscarCache, OscarConfig, load_cache, save_cache
from oscar_kv.config import PAGE_TOKENS
from oscar_kv.generation import can_be_captured
from oscar_kv.kernels import reference, triton_backend
from oscar_kv.storage import offload
from oscar_kv.storage.offload import OffloadedPool, Staging
from oscar_kv.storage.packed import PackedKV

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
LAYERS = 4


@pytest.fixture(autouse=True, scope="module")
def _poison() -> Any:
    """Fills memory that holds nothing yet, and has chunks of a few pages."""
    new_chunk, load_into = OffloadedPool._new_chunk, OffloadedPool.load_into

    def load_into_poisoned(pool: OffloadedPool, data: Tensor) -> None:
        load_into(pool, data.fill_(255))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadedPool, "_new_chunk", lambda pool: new_chunk(pool).fill_(255))
        patch.setattr(OffloadedPool, "load_into", load_into_poisoned)
        patch.setattr(offload, "_CHUNK_BYTES", 20_000)
        yield


@once
def llama(device: str = "cpu") -> Any:
    """A tiny model of four layers, with the weights of the test's seed."""
    config = FAMILIES["Llama"].config()
    config.num_hidden_layers = LAYERS
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config).eval().to(device)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("oscar")
    return model


def pair(model: Any, config: OscarConfig | None = None) -> tuple[OscarCache, OscarCache]:
    """An offloaded cache and a resident one."""
    offloaded, resident = (
        OscarCache(model.config, config, offloading=offloading) for offloading in (True, False)
    )
    return offloaded, resident


def pools(cache: OscarCache) -> list[Any]:
    return [packed.pool for packed in cache.packed_layers()]


# -- a model ---------------------------------------------------------------------------------


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
    save_cache(cache, path)
    again = load_cache(path, model.config, device, offloading=loaded)
    assert again.offloading == loaded
    assert (again.host_nbytes > 0) == loaded
    found = teacher_forced(model, more, [1, 299], again)
    assert torch.equal(found, teacher_forced(model, more, [1, 299], cache))
    if again.staging is not None:
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


# -- what is moved, and when -----------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, int]]:
    """(kind, pool, pages) of every copy."""
    seen: list[tuple[str, Any, int]] = []
    load_into, store = OffloadedPool.load_into, OffloadedPool.store

    def load_into_logged(pool: OffloadedPool, data: Tensor) -> None:
        seen.append(("load", pool, pool.used))
        load_into(pool, data)

    def store_logged(pool: OffloadedPool, ids: Any) -> None:
        if ids:
            seen.append(("store", pool, len(ids)))
        store(pool, ids)

    monkeypatch.setattr(OffloadedPool, "load_into", load_into_logged)
    monkeypatch.setattr(OffloadedPool, "store", store_logged)
    return seen


@torch.no_grad()
def test_the_next_layer_comes_while_one_computes(events: list[Any]) -> None:
    model = llama()
    cache = OscarCache(model.config, offloading=True)
    model(tokens(1, 700), past_key_values=cache)  # 700 = 4 pages and 188 in the tail
    order = {pool: index for index, pool in enumerate(pools(cache))}
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda *_, index=index: events.append(("attended", None, index))
        )
        for index, layer in enumerate(model.model.layers)
    ]
    events.clear()
    for _ in range(2):
        model(tokens(1, 1), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    said = [(kind, index if pool is None else order[pool]) for kind, pool, index in events]
    # The prompt's last layer has sent for the first one.
    one_pass = []
    for layer in range(LAYERS):
        one_pass += [("load", (layer + 1) % LAYERS), ("attended", layer)]
    assert said == one_pass * 2
    assert {pages for kind, _, pages in events if kind == "load"} == {4}


@torch.no_grad()
def test_only_new_pages_are_copied_back(events: list[Any]) -> None:
    model = llama()
    cache = OscarCache(model.config, offloading=True)
    model(tokens(1, 700), past_key_values=cache)
    for count in (1, 66, 1, 1, 127):
        events.clear()
        before = pools(cache)[0].used
        model(tokens(1, count), past_key_values=cache)
        new = pools(cache)[0].used - before
        stored = [(pool, pages) for kind, pool, pages in events if kind == "store"]
        assert stored == ([(pool, new) for pool in pools(cache)] if new else [])


@torch.no_grad()
def test_memory_is_told_apart() -> None:
    model = llama()
    offloaded, resident = pair(model)
    assert offloaded.nbytes == offloaded.host_nbytes == 0
    for cache in (offloaded, resident):
        model(tokens(2, 3000), past_key_values=cache)
    kinds, others = offloaded.memory(), resident.memory()
    for kind in ("codes", "metadata", "norms", "padding", "tail", "tables"):
        assert kinds[kind] == others[kind]
    assert resident.host_nbytes == 0
    pool = pools(offloaded)[0]
    pages = pool.used * 2 * pool.layout.page_bytes
    assert pages * LAYERS <= offloaded.host_nbytes <= (pages + 20_000) * LAYERS
    assert 2 * pages <= kinds["staging"] <= 2.5 * pages
    assert offloaded.nbytes == sum(kinds.values())
    assert sum(kinds[kind] for kind in ("codes", "metadata", "norms", "padding")) == pages * LAYERS


@torch.no_grad()
def test_forgotten_pages_are_freed_at_once() -> None:
    model = llama()
    cache = OscarCache(model.config, offloading=True)
    model(tokens(1, 700), past_key_values=cache)
    kept = [weakref.ref(pool) for pool in pools(cache)]
    cache.reset()
    assert cache.host_nbytes == 0
    assert [pool() for pool in kept] == [None] * LAYERS


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


# -- sequences by themselves -----------------------------------------------------------------

HEADS, HEAD_DIM = 2, 16


def packed_kv(staging: Staging | None, **more: Any) -> PackedKV:
    shape = {"batch_size": 2, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}
    config = OscarConfig(recent_tokens=0, key_group=128)
    return PackedKV(config, **shape, staging=staging, **more)


STEPS = st.tuples(
    st.integers(0, 2),
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 400), min_size=2, max_size=2)),
        st.tuples(st.just("crop"), st.lists(st.floats(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("copy"), st.just([])),
        st.tuples(st.just("prefetch"), st.just([])),
    ),
)


@given(steps=st.lists(STEPS, min_size=4, max_size=14))
def test_sequences_that_share_two_buffers(steps: list[Any]) -> None:
    """Three batches, any order of operations, compared with resident ones after each."""
    staging = Staging("cpu")
    offloaded = [packed_kv(staging) for _ in range(3)]
    resident = [packed_kv(None) for _ in range(3)]
    for number, (which, (action, numbers)) in enumerate(steps):
        for batches in (offloaded, resident):
            batch = batches[which]
            if action == "append":
                keys, values = states("gaussian", 2, HEADS, 400, HEAD_DIM, seed=number)
                batch.append(keys, values, lengths=numbers)
            elif action == "crop":
                batch.crop([int(part * n) for part, n in zip(numbers, batch.lengths)])
            elif action == "select":
                batch.select(numbers)
            elif action == "copy":
                batches[which] = copy.deepcopy(batch)
            else:
                batch.pool.prefetch()
        for one, other in zip(offloaded, resident):
            assert one.pages_per_sequence == other.pages_per_sequence
            for found, expected in zip(one.dense(), other.dense()):
                assert torch.equal(found, expected)


def test_a_moved_batch_is_resident() -> None:
    staging = Staging("cpu")
    packed, *others = (packed_kv(staging) for _ in range(3))
    keys, values = states("gaussian", 2, HEADS, 500, HEAD_DIM)
    packed.append(keys, values)
    moved = packed.to("cpu")
    expected = packed.dense()
    for other in others:  # which take both buffers
        other.append(-keys, -values)
    assert moved.pool.host_nbytes == 0
    for found, wanted in zip(moved.dense(), expected):
        assert torch.equal(found, wanted)


def test_a_copy_that_fails_leaves_no_wrong_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging("cpu")
    batches = [packed_kv(staging) for _ in range(3)]
    for number, batch in enumerate(batches):
        batch.append(*states("gaussian", 2, HEADS, 500, HEAD_DIM, seed=number))
    expected = [batch.dense() for batch in batches]
    load_into = OffloadedPool.load_into

    def interrupted(pool: OffloadedPool, data: Tensor) -> None:
        load_into(pool, data)
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(OffloadedPool, "load_into", interrupted)
        with pytest.raises(torch.OutOfMemoryError):
            batches[0].dense()
    for batch, wanted in zip(reversed(batches), reversed(expected)):
        assert torch.equal(batch.dense()[0], wanted[0])


def test_steps_of_a_kernel_copy_their_pages_back() -> None:
    staging = Staging("cpu")
    one, other, third = (packed_kv(staging) for _ in range(3))
    expected = packed_kv(None)
    keys, values = states("gaussian", 2, HEADS, 270, HEAD_DIM)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        staging = Staging(device)
        one, other, third = (packed_kv(staging, device=device) for _ in range(3))
        expected = packed_kv(None, device=device)
    for begin, end in ((0, 120), (120, 135), (135, 250), (250, 260), (260, 270)):
        for batch in (one, expected):
            new = keys[:, :, begin:end].to(device), values[:, :, begin:end].to(device)
            operations = triton_backend if end - begin <= 16 else reference
            operations.append(batch, *new)
        for batch in (other, third):  # which take both buffers
            batch.append(keys[:, :, :PAGE_TOKENS].to(device), values[:, :, :PAGE_TOKENS].to(device))
    assert one.pages_per_sequence == [2, 2]
    for found, wanted in zip(one.dense(), expected.dense()):
        assert torch.equal(found, wanted)


class _Recorder:
    """Stands for a stream or an event of CUDA, and says in ``log`` what it was asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: _Recorder) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    wait_event = wait_stream

    def record(self, stream: _Recorder) -> None:
        self.log.append(f"{self.name} on {stream.name}")


def test_what_waits_for_what_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of a buffer are done before the copy into it begins, which ends before new ones."""
    staging = Staging("cpu")
    first, *others = (packed_kv(staging) for _ in range(3))
    for batch in (first, *others):
        batch.append(*states("gaussian", 2, HEADS, 300, HEAD_DIM))
    log: list[str] = []
    current, load_into = _Recorder("current", log), OffloadedPool.load_into

    def logged(pool: OffloadedPool, data: Tensor) -> None:
        log.append("copies")
        load_into(pool, data)

    @contextmanager
    def on(stream: _Recorder) -> Iterator[None]:
        log.append(f"{stream.name} {{")
        yield
        log.append("}")

    monkeypatch.setattr(staging, "_stream", _Recorder("side", log))
    monkeypatch.setattr(OffloadedPool, "load_into", logged)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", lambda: _Recorder("event", log))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("host waits"))
    monkeypatch.setattr(
        Tensor, "record_stream", lambda _, stream: log.append(f"kept for {stream.name}")
    )
    first.pool.prefetch()
    copied = ["side waits for current", "kept for side", "side {", "copies", "event on side", "}"]
    assert log == copied
    first.dense()
    assert log == [*copied, "current waits for event"]
    log.clear()
    others[1].pool.prefetch()  # is there
    first.crop([200, 300])  # reads a page on the host
    assert log == ["host waits"]


# -- on a GPU --------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_wait_for_the_kernels_that_use_their_buffers() -> None:
    """With pages enough that copies and attention take turns for real, many times over."""
    staging = Staging("cuda")
    batches = [packed_kv(staging, device="cuda") for _ in range(6)]
    expected = []
    for number, batch in enumerate(batches):
        keys, values = states("gaussian", 2, HEADS, 20_000, HEAD_DIM, seed=number)
        batch.append(keys.cuda(), values.cuda())
        expected.append([part.sum(2).cpu() for part in batch.dense()])
    found = []
    for _ in range(10):
        for number, batch in enumerate(batches):
            batch.pool.prefetch()
            batches[(number + 1) % len(batches)].pool.prefetch()
            found.append([part.sum(2) for part in batch.dense()])
    for number, sums in enumerate(found):
        for one, other in zip(sums, expected[number % len(batches)]):
            assert torch.equal(one.cpu(), other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pages_are_in_pinned_memory_and_copies_of_them_too() -> None:
    packed = packed_kv(Staging("cuda"), device="cuda")
    keys, values = states("gaussian", 2, HEADS, 500, HEAD_DIM)
    packed.append(keys.cuda(), values.cuda())
    for batch in (packed, copy.deepcopy(packed)):
        assert isinstance(batch.pool, OffloadedPool)
        assert batch.pool._chunks
        assert all(chunk.is_pinned() for chunk in batch.pool._chunks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_the_device_holds_two_layers() -> None:
    """The pages of eight layers; what is freed with a copy under way is not handed out early."""
    config = copy.deepcopy(llama().config)
    config.num_hidden_layers = 8
    model = AutoModelForCausalLM.from_config(config).eval().cuda()
    model.set_attn_implementation("oscar")
    ids = tokens(4, 3000).cuda()
    used, pages = [], 0
    for cache in pair(model):
        before = torch.cuda.memory_allocated()
        model(ids, past_key_values=cache, logits_to_keep=1)
        model(ids[:, :1], past_key_values=cache)
        used.append(torch.cuda.memory_allocated() - before)
        pages = sum(pool.used * HEADS * pool.layout.page_bytes for pool in pools(cache))
    assert used[0] <= used[1] - 5 / 8 * pages
