"""Sequences that share two staging buffers: their pages are right whoever had these before."""

from __future__ import annotations

import copy
from typing import Any

import offload_pairs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_pairs import HEAD_DIM, HEADS, packed_kv
from states import states
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.kernels import reference, triton_backend
from oscar_kv.storage.offload import OffloadedPool, Staging

_poison = offload_pairs.poison  # a fixture of every test here

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
