"""How the host divides decode attention among the blocks of a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_decode_checks import CHANNELS, CONFIGS, check, needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import packed_states

from oscar_kv import OscarConfig
from oscar_kv.kernels import cuda_decode
from oscar_kv.kernels.cuda_decode import WARPS


@needs_compiler
@pytest.mark.parametrize("processors", [1, 12, 132])
def test_the_host_code_divides_the_work(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(cuda_decode, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: 228 << 10)
    monkeypatch.setattr(cuda_decode, "block_shared_memory", lambda device: 227 << 10)
    config = OscarConfig(sink_tokens=3)
    packed = packed_states(config, 64, None, (1700, 700), dtype=torch.float16)
    check(packed, 2, 1, None)
    check(packed, 1, 4, None, fresh=True, starts=torch.tensor([0, 690]))
    short = packed_states(config, 64, None, (5, 100), dtype=torch.float16)
    check(short, 2, 1, None)
    ragged = packed_states(config, 64, None, (1700, 130, 130), dtype=torch.float16)
    assert (cuda_decode.plan(ragged, 0).streamed > 0) == (processors == 1)
    check(ragged, 2, 1, None)


@given(
    counts=st.lists(st.integers(0, 9000), min_size=1, max_size=40),
    heads=st.integers(1, 16),
    processors=st.integers(1, 200),
    together=st.integers(1, 2),
    fewest=st.sampled_from([1, 2, 4]),
)
def test_every_page_is_read_once(
    counts: list[int], heads: int, processors: int, together: int, fewest: int
) -> None:
    pages, owners, read = max(counts), heads * len(counts), heads * sum(counts)
    team, parts = cuda_decode._divide(
        len(counts), owners, pages, read, processors, together, fewest
    )
    assert team in (1, 2, 4)
    assert team >= fewest
    if not parts:
        return  # the kernel divides: test_many_sequences_share_the_blocks of test_cuda_decode.py
    assert owners * parts <= max(owners, 4 * together * processors)
    teams = WARPS // team
    assert parts <= max(1, -(-pages // teams))  # otherwise some have nothing to do
    found = [
        page
        for part, index in itertools.product(range(parts), range(teams))
        for page in range(part * teams + index, pages, parts * teams)
    ]
    assert sorted(found) == list(range(pages))


@pytest.mark.parametrize(
    ("counts", "streamed"),
    [
        ([8], False),  # a page at once
        ([256] * 8, False),  # four parts each fill the places of an H200
        ([256, 230, 192, 154, 128, 77, 51, 26], True),  # parts would be as unlike as sequences
        ([256] * 29, True),  # 232 sequences and heads, 264 places
        ([31] * 234, False),  # the more sequences there are, the longer a share takes to find
        ([31] * 1176, False),
        ([255] * 32, False),  # 256 sequences and heads
    ],
)
def test_work_is_shared_evenly_where_that_is_faster(counts: list[int], streamed: bool) -> None:
    owners, read = 8 * len(counts), 8 * sum(counts)
    _, parts = cuda_decode._divide(len(counts), owners, max(counts), read, 132, 2, 1)
    assert (parts == 0) == streamed


@pytest.mark.parametrize("per_block", [99 << 10, 163 << 10, 227 << 10])  # sm_89, sm_80, sm_90
def test_blocks_fit_a_multiprocessor(monkeypatch: pytest.MonkeyPatch, per_block: int) -> None:
    monkeypatch.setattr(cuda_decode, "multiprocessors", lambda device: 1)  # has it all to do
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: per_block + 1024)
    monkeypatch.setattr(cuda_decode, "block_shared_memory", lambda device: per_block)
    for config, channels in itertools.product(CONFIGS.values(), CHANNELS):
        packed = packed_states(config, *channels, (300,), dtype=torch.bfloat16)
        team = cuda_decode.plan(packed, 0).team
        program = cuda_decode.decode_program(packed.layout, torch.bfloat16, team)
        assert program.shared_memory <= per_block
