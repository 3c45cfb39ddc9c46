"""A few queries over packed pages in CUDA C++, against the float64 oracle over the unpacked states.

Without a GPU the kernels are emulated (``emulated.py``): a few well-mixed cases there, the full
product and long contexts on a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import kernel_checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DEVICE, GPU, LENGTHS, OPTIONS, packed_states
from states import states
from torch import Tensor

from oscar_kv import OscarConfig, PackedKV, quantize
from oscar_kv.config import PRESETS
from oscar_kv.kernels import cuda_decode
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.cuda_decode import COLUMNS, DENSE_TOKENS, WARPS, Plan, takes, unsupported
from oscar_kv.kernels.masking import Visibility
from oscar_kv.storage.layout import PageLayout

needs_compiler = pytest.mark.skipif(
    not GPU and emulated.COMPILER is None, reason="the emulator of a GPU is compiled by g++"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="too slow in the emulator")
decode = cuda_decode.decode if GPU else emulated.decode


class Division(NamedTuple):
    """A :class:`Plan` without the dense parts, which packed states determine."""

    team: int = 1
    page_parts: int = 2
    dense_apart: bool = False
    streamed: int = 0


def check(
    packed: PackedKV, group: int, tokens: int, division: Division | None, **options: Any
) -> Tensor:
    """As :func:`kernel_checks.check`; ``None`` leaves the division to the host code."""
    work = None
    if division is not None:
        new = tokens if options.get("fresh") else 0
        dense = (packed.most_tail_tokens, packed.config.sink_tokens, new)
        parts = sum(-(-count // DENSE_TOKENS) for count in dense)
        work = Plan(
            division.team,
            0 if division.streamed else division.page_parts,
            parts,
            division.dense_apart,
            division.streamed,
        )
    return kernel_checks.check(partial(decode, work=work), packed, group, tokens, **options)


CONFIGS = {
    **{preset: OscarConfig.preset(preset) for preset in PRESETS},
    "4-bit values": OscarConfig(value_bits=4, key_group=16, value_group=16, token_scale="none"),
    "fp16": OscarConfig(key_bits=4, value_bits=4, key_group=64, value_group=32, metadata="fp16"),
}
CHANNELS = [
    channels
    for channels in ((64, None), (128, None), (256, None), (64, 128), (128, 64), (256, 128))
    if unsupported(PageLayout(OscarConfig(), channels[0], 2, channels[1])) is None
]
ROWS = ((4, 1), (8, 1), (2, 3), (1, 8))
PARTS = (1, 2, 7)  # no sequence has seven pages
STREAMS = (1, 5, 64)  # blocks: one for all, some in the middle of a sequence, more than work

FEW = [
    ("compact", (128, None), 1, torch.float16),
    ("compact", (64, 128), 4, torch.bfloat16),
    ("quality", (128, 64), 2, torch.bfloat16),
    ("paper", (64, None), 1, torch.bfloat16),
    ("paper", (128, None), 2, torch.float16),
    ("high", (64, None), 1, torch.bfloat16),
    ("4-bit values", (64, None), 1, torch.float16),
    ("fp16", (64, None), 4, torch.float16),
]


@needs_compiler
@pytest.mark.parametrize(
    ("config", "channels", "team", "dtype"),
    # Of thousands of random cases the unluckiest would be beyond the tolerance of float16.
    [*FEW, *itertools.product(CONFIGS, CHANNELS, (1, 2, 4), (torch.bfloat16,))] if GPU else FEW,
)
def test_agrees_with_the_oracle(
    config: str, channels: tuple[int, int | None], team: int, dtype: torch.dtype
) -> None:
    lengths = LENGTHS if GPU else (70, 256, 517)
    packed = packed_states(CONFIGS[config], *channels, lengths, dtype=dtype)
    divisions = list(itertools.product(PARTS, (False, True)))
    chosen = itertools.product(ROWS, divisions) if GPU else zip(ROWS, divisions[1:])
    for (group, tokens), (parts, apart) in chosen:
        check(packed, group, tokens, Division(team, parts, apart))
    for (group, tokens), blocks in zip(ROWS, STREAMS if GPU or team == 1 else STREAMS[1:2]):
        check(packed, group, tokens, Division(team, streamed=blocks))


@needs_compiler
@pytest.mark.parametrize("team", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("preset", ["compact", "paper"] if GPU else ["compact"])
def test_options(options: dict[str, Any], preset: str, team: int) -> None:
    for sinks, tokens, fresh, apart in (
        itertools.product((0, 5), (1, 2), (False, True), (False, True))
        if GPU
        else ((0, 1, True, True), (5, 2, team == 2, False))
    ):
        config = dataclasses.replace(OscarConfig.preset(preset), sink_tokens=sinks)
        packed = packed_states(config, 64, dtype=torch.float16)
        check(packed, 3, tokens, Division(team, 2, apart), fresh=fresh, **options)
        if GPU or team != 2:
            check(packed, 3, tokens, Division(team, streamed=3), fresh=fresh, **options)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_dtypes_of_attention_sinks(dtype: torch.dtype) -> None:
    packed = packed_states(OscarConfig(), 64, dtype=torch.float16)
    for group, tokens in ((4, 1), (2, 3)):
        sinks = torch.linspace(-2, 3, 2 * group).to(dtype)
        check(packed, group, tokens, Division(), s_aux=sinks)


@needs_compiler
def test_every_kind_of_token_may_be_missing() -> None:
    for recent, lengths in (
        (0, (128, 256)),  # no full-precision tokens
        (0, (0, 3, 300)),  # nothing at all in a sequence, or no pages
        (128, (1, 128)),  # no pages anywhere
        (128, (0, 256, 600)),
        (1000, (1300, 200)),  # more parts of full-precision tokens than of pages
    ):
        config = OscarConfig(recent_tokens=recent)
        packed = packed_states(config, 64, lengths=lengths, dtype=torch.float16)
        for division in (Division(), Division(4, 3, True), Division(streamed=3)):
            check(packed, 4, 1, division)
            out = check(packed, 1, 5, division)
            for row, length in enumerate(lengths):  # queries before the start see nothing
                assert not out[row, :, : max(0, 5 - length)].any()


@needs_compiler
def test_new_tokens_in_pages_and_beside_them() -> None:
    for recent, division in itertools.product((0, 3, 128), (Division(), Division(4, 3, True))):
        config = OscarConfig(recent_tokens=recent, sink_tokens=5)
        packed = packed_states(config, 64, lengths=(8, 133, 136, 517), dtype=torch.float16)
        check(packed, 1, 8, division, fresh=True)
        check(packed, 2, 3, division, fresh=True, sliding_window=2)


@needs_compiler
def test_zeros_and_large_numbers() -> None:
    keys, values = states("gaussian", 1, 1, 600, 64)
    keys[:, :, :128] = 0
    values[:, :, 128:256] = 0
    packed = quantize(keys.to(DEVICE, torch.float16), values.to(DEVICE, torch.float16))
    check(packed, 1, 2, Division())
    work = Plan(team=1, page_parts=2, dense_parts=2)
    for number in (0, 3e4):
        query = torch.full((1, 1, 1, 64), number, dtype=torch.float16, device=DEVICE)
        visible = Visibility(1)
        out = decode(AttentionCall(query, packed, visible, 1e-3), work=work)
        assert out.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("metadata", ["fp8", "fp16"])
def test_pages_of_very_different_values(metadata: str) -> None:
    config = OscarConfig(metadata=metadata, recent_tokens=0)  # pyright: ignore[reportArgumentType]
    keys, values = states("gaussian", 1, 1, 768, 64)
    for page, factor in enumerate((1e-18, 1e18, 1.0, 1e-12, 1e4, 1e17)):
        values[:, :, 128 * page : 128 * (page + 1)] *= factor
    keys, values = (x.to(DEVICE, torch.bfloat16) for x in (keys, values))
    packed = quantize(keys, values, config)
    for newest in (1, 2, 4, 6):  # the newest page alone, and together with louder ones
        cropped = packed.to(DEVICE)
        cropped.crop(128 * newest)
        check(cropped, 1, 2, Division(page_parts=1), sliding_window=300)


@needs_compiler
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_token_scales_shared_by_heads(heads: int) -> None:
    lengths = LENGTHS if GPU else (300, 128)
    packed = packed_states(OscarConfig.paper(), 64, None, lengths, heads, torch.float16)
    for team in (1, 2, 4) if GPU else (2,):
        check(packed, 2, 2, Division(team))


@needs_compiler
def test_page_ids_are_fetched_again() -> None:
    """A team has 32 of them at hand."""
    config = OscarConfig(sink_tokens=5)
    packed = packed_states(config, 64, None, (4600, 300), heads=1, dtype=torch.float16)
    division = Division(team=4, page_parts=1)
    check(packed, 1, 1, division)
    check(packed, 1, 2, division, sliding_window=4400)


@needs_compiler
@pytest.mark.parametrize("blocks", [1, 7, 200])
def test_many_sequences_share_the_blocks(blocks: int) -> None:
    """More than the 32 that a warp looks at together, some without pages, some without tokens."""
    lengths = [0, 0, *torch.randint(0, 700, (70,)).tolist(), 0]
    for recent in (0, 3):
        config = OscarConfig(recent_tokens=recent)
        packed = packed_states(config, 64, lengths=lengths, heads=1, dtype=torch.bfloat16)
        check(packed, 2, 1, Division(streamed=blocks))
        check(packed, 2, 1, Division(team=4, streamed=blocks), sliding_window=200)


@needs_gpu
@pytest.mark.parametrize("length", [33_000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_contexts(length: int, dtype: torch.dtype) -> None:
    packed = packed_states(OscarConfig(), 128, None, (length, 1000), dtype=dtype)
    for division in (None, Division(), Division(4, 100, True), Division(streamed=264)):
        check(packed, 4, 1, division)
        check(packed, 4, 2, division, sliding_window=20_000)


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


def test_declines_what_it_was_not_made_for() -> None:
    usual = packed_states(OscarConfig(), 64, dtype=torch.float16)

    def taken(
        group: int = 4,
        tokens: int = 1,
        dtype: torch.dtype = torch.float16,
        mask: Tensor | None = None,
        packed: PackedKV = usual,
    ) -> bool:
        layout = packed.layout
        query = torch.zeros(
            packed.batch_size, group * layout.num_kv_heads, tokens, layout.head_dim, dtype=dtype
        )
        return takes(AttentionCall(query, packed, Visibility(tokens, mask=mask), 1.0))

    assert taken()
    assert taken(COLUMNS, 1)
    assert taken(1, COLUMNS)
    assert not taken(COLUMNS + 1, 1)
    assert not taken(4, 3)
    assert not taken(dtype=torch.float32)
    assert not taken(dtype=torch.bfloat16)  # and the states are float16
    assert not taken(dtype=torch.float32, packed=packed_states(OscarConfig(), 64))
    assert not taken(mask=torch.ones(1, 1, 1, max(LENGTHS), dtype=torch.bool))
    assert not taken(packed=packed_states(OscarConfig(), 96, dtype=torch.float16))
    assert not taken(packed=packed_states(OscarConfig(), 64, 80, dtype=torch.float16))


@pytest.mark.parametrize(
    ("config", "channels", "heads", "reason"),
    [
        (OscarConfig(), (64, None), 3, None),
        (OscarConfig(), (96, None), 2, "head_dim=96"),
        (OscarConfig(), (64, 80), 2, "value_head_dim=80"),
        (OscarConfig(value_group=8), (64, None), 2, "value_group=8"),
        (OscarConfig.paper(), (128, None), 1, None),
        (OscarConfig.paper(), (128, None), 2, None),
        (OscarConfig.paper(), (128, None), 8, None),
        (OscarConfig.paper(), (128, None), 3, "shared by 3 heads"),
        (OscarConfig.paper(), (128, None), 32, "shared by 32 heads"),
    ],
)
def test_says_which_pages_it_cannot_read(
    config: OscarConfig, channels: tuple[int, int | None], heads: int, reason: str | None
) -> None:
    found = unsupported(PageLayout(config, channels[0], heads, channels[1]))
    assert found is None if reason is None else found is not None and reason in found


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
        return  # the kernel divides: test_many_sequences_share_the_blocks
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


class Copied(ctypes.Structure):
    """``struct Arguments`` of the kernel below."""

    _fields_ = (("source", ctypes.c_void_p), ("target", ctypes.c_void_p))


REVERSE = """
#include <warp.cuh>
struct Arguments { const u32* source; u32* target; };
extern "C" __global__ void reverse(const __grid_constant__ Arguments a) {
  wait_for_previous_grid();
  u8* memory = shared_memory();
  copy_async(memory + 16 * thread(), a.source + 4 * thread());
  commit_copies();
  WAIT;
  SYNC;
  a.target[thread()] = load<1>(memory + 16 * (63 - thread())).at[0];
}
"""


@pytest.mark.skipif(emulated.COMPILER is None, reason="the emulator is compiled by g++")
@pytest.mark.parametrize(
    ("wait", "sync", "memory", "mistake"),
    [
        ("wait_for_copies<0>()", "sync_block()", 1024, None),
        ("wait_for_copies<1>()", "sync_block()", 1024, "wrong"),
        ("wait_for_copies<0>()", "sync_warp()", 1024, "wrong"),
        ("wait_for_copies<0>()", "if(thread()<9)sync_block()", 1024, "never reach"),
        ("wait_for_copies<0>()", "sync_block()", 1000, "beyond"),
    ],
)
def test_the_emulator_notices_mistakes(
    tmp_path: Path, wait: str, sync: str, memory: int, mistake: str | None
) -> None:
    (tmp_path / "reverse.cu").write_text(REVERSE)
    kernel = emulated.build("reverse", (("WAIT", wait), ("SYNC", sync)), tmp_path)
    kernel.emulate.restype = ctypes.c_char_p
    source = torch.arange(256, dtype=torch.int32)
    target = torch.zeros(64, dtype=torch.int32)
    argument = Copied(source=source.data_ptr(), target=target.data_ptr())
    found = kernel.emulate(ctypes.byref(argument), 1, 64, memory)
    if found is None and not torch.equal(target, source[::4].flip(0)):
        found = b"wrong"
    assert found is None if mistake is None else found is not None and mistake in found.decode()


@needs_compiler
def test_slots_out_of_use_may_hold_anything() -> None:
    config = OscarConfig(sink_tokens=5)
    packed = packed_states(config, 64, lengths=(3, 150, 300), dtype=torch.float16)
    for part, lengths in (("tail", packed.tail_lengths), ("sink", packed.sink_lengths)):
        for row, used in enumerate(lengths.tolist()):
            getattr(packed, f"{part}_keys")[row, :, used:] = torch.nan
            getattr(packed, f"{part}_values")[row, :, used:] = torch.nan
    check(packed, 4, 1, Division(dense_apart=True))


@needs_compiler
def test_many_pages_of_one_team() -> None:
    """What tensor cores cut off their sums must not add up from page to page."""
    keys, values = states("gaussian", 1, 1, 128 * 200, 64)
    config = OscarConfig(recent_tokens=0)
    packed = quantize(keys.to(DEVICE, torch.float16), values.to(DEVICE, torch.float16), config)
    check(packed, 1, 1, Division(page_parts=1))


@needs_compiler
def test_states_at_any_address() -> None:
    packed = packed_states(OscarConfig(), 64, lengths=(200,), heads=1, dtype=torch.float16)
    flat = torch.randn(4 * 64 + 1, device=DEVICE, dtype=torch.float16)
    visible = Visibility(1)
    found = [
        decode(AttentionCall(query, packed, visible, 0.1), work=Plan(1, 1, 2))
        for query in (flat[1:].view(1, 4, 1, 64), flat[1:].clone().view(1, 4, 1, 64))
    ]
    assert torch.equal(*found)
