"""Many queries over packed pages in Triton, against the float64 oracle over the unpacked states.

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
from oscar_kv.core.rotation import rotate
from oscar_kv.kernels import triton_extend
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.masking import Visibility
from oscar_kv.kernels.triton_extend import extend
from oscar_kv.kernels.triton_rotate import rotate_queries

check = partial(kernel_checks.check, extend)

FEW = [
    ("compact", (128, None), 4, 20),
    ("compact", (256, None), 1, 20),
    ("paper", (64, None), 3, 20),
    ("paper", (80, None), 1, 20),
    ("quality", (192, 128), 3, 21),
    ("quality", (96, None), 1, 20),
    ("high", (112, None), 1, 70),
]


@pytest.mark.parametrize(
    ("preset", "channels", "group", "tokens"),
    [
        (preset, channels, *rows)
        for preset, channels, rows in itertools.product(
            PRESETS, HEAD_DIMS, ((1, 70), (4, 20), (8, 33))
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
    check(packed, 4, 64, fresh=True)


def test_float16() -> None:
    packed = packed_states(OscarConfig.compact(), 64, dtype=torch.float16)
    check(packed, 2, 40)
    check(packed, 1, 20, dtype=torch.float32)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sinks", [0, 5] if GPU else [5])
@pytest.mark.parametrize("preset", ["compact", "paper"] if GPU else ["compact"])
def test_options(options: dict[str, Any], sinks: int, preset: str) -> None:
    config = dataclasses.replace(OscarConfig.preset(preset), sink_tokens=sinks)
    check(packed_states(config, 64), 3, 20, **options)


@pytest.mark.parametrize("shape", [(5, 6, 20), (1, 1, 20), (5, 1, 1)])
@pytest.mark.parametrize("additive", [False, True])
def test_any_mask(shape: tuple[int, int, int], additive: bool) -> None:
    packed = packed_states(OscarConfig.compact(), 64)
    mask = torch.randn(*shape, max(LENGTHS) + 3) * 3
    if additive:
        mask[..., ::7] = -torch.inf
        check(packed, 3, 20, mask=mask, sliding_window=300)
    else:
        check(packed, 3, 20, mask=mask > -1, fresh=True)


def test_an_additive_mask_of_lowest_numbers_outweighs_and_does_not_hide() -> None:
    packed = packed_states(OscarConfig.compact(), 64, lengths=(300,), heads=1)
    mask = torch.zeros(1, 1, 20, 300)
    mask[:, :, :3] = torch.finfo(torch.float32).min
    check(packed, 1, 20, mask=mask)


@pytest.mark.parametrize("preset", PRESETS)
def test_new_tokens_are_seen_exactly(preset: str) -> None:
    lengths = LENGTHS if GPU else (100, 300)
    check(packed_states(OscarConfig.preset(preset), 64, lengths=lengths), 2, 65, fresh=True)


def test_queries_before_the_start_of_their_sequence_see_nothing() -> None:
    packed = packed_states(OscarConfig.paper(), 64, lengths=(0, 7, 300))
    out = check(packed, 2, 20)
    assert not out[0].any()
    assert not out[1, :, :13].any()


def test_zeros() -> None:
    keys, values = states("gaussian", 1, 1, 600, 64)
    keys[:, :, :128] = 0
    values[:, :, 128:256] = 0
    packed = quantize(keys.to(DEVICE), values.to(DEVICE))
    check(packed, 1, 20)
    query = torch.zeros(1, 1, 20, 64, device=DEVICE)
    out = extend(AttentionCall(query, packed, Visibility(20), 0.1))
    assert out.isfinite().all()


@pytest.mark.parametrize("metadata", ["fp8", "fp16"])
def test_pages_of_very_different_values(metadata: str) -> None:
    config = OscarConfig(metadata=metadata, recent_tokens=0)  # pyright: ignore[reportArgumentType]
    keys, values = states("gaussian", 1, 1, 768, 64)
    factors = (1e-4, 1.0, 3e3, 1e-3, 50.0, 1.0)
    if metadata == "fp8":
        factors = (1e-30, 1e18, 1.0, 1e-12, 1e4, 1e17)
    for page, factor in enumerate(factors):
        values[:, :, 128 * page : 128 * (page + 1)] *= factor
    packed = quantize(keys.to(DEVICE), values.to(DEVICE), config)
    for newest in (1, 2, 4, 6):  # the newest page alone, and together with louder ones
        cropped = packed.to(DEVICE)
        cropped.crop(128 * newest)
        check(cropped, 1, 20, sliding_window=300)


def test_parts_of_a_long_prefix_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_extend, "multiprocessors", lambda device: 4)
    config = dataclasses.replace(OscarConfig.compact(), sink_tokens=3)
    packed = packed_states(config, 64, lengths=(1700, 700), heads=1)
    assert triton_extend._parts(2, packed.block_table.shape[1], packed.device) > 2
    check(packed, 2, 20)
    check(packed, 2, 20, starts=torch.tensor([0, 690]), s_aux=torch.tensor([1.0, -1.0]))
    check(packed, 2, 20, mask=torch.rand(1, 1, 20, 1700) > 0.3, fresh=True)
    check(packed, 2, 20, sliding_window=1000)


@needs_gpu
@pytest.mark.parametrize("length", [5000, 33000])
@pytest.mark.parametrize("tokens", [20, 512])
def test_long_contexts(length: int, tokens: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        packed = packed_states(
            OscarConfig.compact(), 128, lengths=(length, 1000), heads=8, dtype=dtype
        )
        check(packed, 4, tokens)
        check(packed, 4, tokens, fresh=True, sliding_window=4096)


@pytest.mark.parametrize("head_dim", [64, 80, 192, 256])
def test_rotated_queries(head_dim: int) -> None:
    rows = torch.randn(2, 5, 3, head_dim, device=DEVICE).transpose(1, 2)
    rows *= torch.exp(3 * torch.randn(2, 3, 5, 1, device=DEVICE))
    rows[0, 0, 0] = 0
    rotated, factors = rotate_queries(rows)
    assert rotated.abs().amax(-1).unique().tolist() == [0.0, 1.0]
    expected = rotate(rows.double())
    error = rotated.double() * factors.double().unsqueeze(-1) - expected
    assert error.norm() <= 3e-4 * expected.norm()
    one, factor = rotate_queries(rows[1, 1, 1])
    assert torch.equal(one, rotated[1, 1, 1])
    assert factor.shape == ()
