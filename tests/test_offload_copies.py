"""Which pages are copied, when, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import offload_pairs
import pytest
import torch
from families import tokens
from offload_pairs import HEAD_DIM, HEADS, LAYERS, llama, packed_kv, pools
from states import states
from torch import Tensor

from oscar_kv import OscarCache
from oscar_kv.storage.offload import OffloadedPool, Staging

_poison = offload_pairs.poison  # a fixture of every test here


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
