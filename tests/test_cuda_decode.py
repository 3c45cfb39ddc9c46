"""A few queries over packed pages in CUDA C++, against the float64 oracle over the unpacked states.

Without a GPU the kernels are emulated (``emulated.py``): a few well-mixed cases there, the full
product and long contexts on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cuda_decode_checks import CHANNELS, CONFIGS, Division, check, decode, needs_compiler
from kernel_checks import DEVICE, GPU, LENGTHS, OPTIONS, packed_states
from states import states

from oscar_kv import OscarConfig, quantize
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.cuda_decode import Plan
from oscar_kv.kernels.masking import Visibility

needs_gpu = pytest.mark.skipif(not GPU, reason="too slow in the emulator")

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
