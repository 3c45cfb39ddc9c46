"""A few queries over packed pages in Triton, against the float64 oracle over the unpacked states.

Without a GPU the kernels run in Triton's interpreter: a few well-mixed cases there, the full
product and long contexts on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import kernel_checks
import pytest
import torch
from kernel_checks import DEVICE, GPU, HEAD_DIMS, LENGTHS, OPTIONS, needs_gpu, packed_states
from states import states

from oscar_kv import OscarConfig, quantize
from oscar_kv.config import PRESETS
from oscar_kv.kernels import triton_decode
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.masking import Visibility
from oscar_kv.kernels.triton_decode import decode

check = partial(kernel_checks.check, decode)

FEW = [
    ("compact", (128, None), 4, 1),
    ("compact", (256, None), 1, 1),
    ("paper", (64, None), 3, 2),
    ("paper", (80, None), 1, 1),
    ("quality", (192, 128), 3, 3),
    ("quality", (96, None), 1, 1),
    ("high", (112, None), 9, 1),
    ("high", (64, None), 3, 7),
]


@pytest.mark.parametrize(
    ("preset", "channels", "group", "tokens"),
    [
        (preset, channels, *rows)
        for preset, channels, rows in itertools.product(
            PRESETS, HEAD_DIMS, ((1, 1), (4, 3), (8, 1), (3, 16))
        )
    ]
    if GPU
    else FEW,
)
def test_agrees_with_the_oracle(
    preset: str, channels: tuple[int, int | None], group: int, tokens: int
) -> None:
    lengths = LENGTHS if GPU or channels[0] <= 64 else (300,)
    check(packed_states(OscarConfig.preset(preset), *channels, lengths), group, tokens)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", HEAD_DIMS)
def test_half_precision(preset: str, channels: tuple[int, int | None], dtype: torch.dtype) -> None:
    packed = packed_states(OscarConfig.preset(preset), *channels, dtype=dtype)
    check(packed, 4, 1)
    check(packed, 4, 5, fresh=True)


def test_float16() -> None:
    packed = packed_states(OscarConfig.compact(), 64, dtype=torch.float16)
    check(packed, 2, 2)
    check(packed, 1, 1, dtype=torch.float32)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sinks", [0, 5] if GPU else [5])
@pytest.mark.parametrize("preset", ["compact", "paper"] if GPU else ["compact"])
def test_options(options: dict[str, Any], sinks: int, preset: str, tokens: int) -> None:
    config = dataclasses.replace(OscarConfig.preset(preset), sink_tokens=sinks)
    check(packed_states(config, 64), 3, tokens, **options)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("batch", "heads"), [(5, 6), (1, 1), (5, 1)])
@pytest.mark.parametrize("additive", [False, True])
def test_any_mask(batch: int, heads: int, tokens: int, additive: bool) -> None:
    packed = packed_states(OscarConfig.compact(), 64)
    mask = torch.randn(batch, heads, tokens, max(LENGTHS) + 3) * 3
    if additive:
        mask[..., ::7] = -torch.inf
        check(packed, 3, tokens, mask=mask, sliding_window=300)
    else:
        check(packed, 3, tokens, mask=mask > -1, fresh=True)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("preset", PRESETS)
def test_new_tokens_are_seen_exactly(preset: str, tokens: int) -> None:
    lengths = LENGTHS if GPU else (100, 300)
    check(packed_states(OscarConfig.preset(preset), 64, lengths=lengths), 2, tokens, fresh=True)


def test_queries_before_the_start_of_their_sequence_see_nothing() -> None:
    packed = packed_states(OscarConfig.paper(), 64, lengths=(0, 3, 300))
    out = check(packed, 2, 5)
    assert not out[0].any()
    assert not out[1, :, :2].any()


def test_zeros_and_large_numbers() -> None:
    keys, values = states("gaussian", 1, 1, 600, 64)
    keys[:, :, :128] = 0
    values[:, :, 128:256] = 0
    packed = quantize(keys.to(DEVICE), values.to(DEVICE))
    check(packed, 1, 2)
    for query in (torch.zeros(1, 1, 1, 64), torch.full((1, 1, 1, 64), 3e4)):
        query = query.to(DEVICE)
        out = decode(AttentionCall(query, packed, Visibility(1), 1e-3))
        assert out.isfinite().all()


@pytest.mark.parametrize("metadata", ["fp8", "fp16"])
def test_pages_of_very_different_values(metadata: str) -> None:
    config = OscarConfig(metadata=metadata, recent_tokens=0)  # pyright: ignore[reportArgumentType]
    keys, values = states("gaussian", 1, 1, 768, 64)
    for page, factor in enumerate((1e-18, 1e18, 1.0, 1e-12, 1e4, 1e17)):
        values[:, :, 128 * page : 128 * (page + 1)] *= factor
    packed = quantize(keys.to(DEVICE), values.to(DEVICE), config)
    for newest in (1, 2, 4, 6):  # the newest page alone, and together with louder ones
        cropped = packed.to(DEVICE)
        cropped.crop(128 * newest)
        check(cropped, 1, 2, sliding_window=300)


def test_many_splits_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(OscarConfig.compact(), sink_tokens=3)
    packed = packed_states(config, 64, lengths=(1700, 700), heads=1)
    for programs in (1, 4, 100):
        monkeypatch.setattr(triton_decode, "multiprocessors", lambda device, n=programs: n)
        check(packed, 2, 1)
        check(packed, 2, 1, starts=torch.tensor([0, 690]), s_aux=torch.tensor([1.0, -1.0]))
        check(packed, 2, 3, sliding_window=1000)


@needs_gpu
@pytest.mark.parametrize("length", [1, 5000, 33000, 300_000])
def test_long_contexts(length: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        packed = packed_states(
            OscarConfig.compact(), 128, lengths=(length, 1000), heads=2, dtype=dtype
        )
        check(packed, 4, 1)
