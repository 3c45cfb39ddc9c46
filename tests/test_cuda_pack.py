"""Packing in CUDA C++, against what a page means.

Without a GPU the kernel is emulated (``emulated.py``): a few well-mixed cases there, the full
product on a GPU.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import emulated
import pack_checks
import pytest
import torch
from kernel_checks import DEVICE, GPU
from pack_checks import pack, page_states, relative_error
from states import KINDS
from torch import Tensor

from oscar_kv import OscarConfig, quantize
from oscar_kv.kernels import cuda_backend, cuda_pack
from oscar_kv.kernels.cuda_pack import takes, unsupported
from oscar_kv.storage import codec
from oscar_kv.storage.layout import PageLayout

needs_compiler = pytest.mark.skipif(
    not GPU and emulated.COMPILER is None, reason="the emulator of a GPU is compiled by g++"
)
pack_into = cuda_pack.pack_into if GPU else emulated.pack_into

CONFIGS = {
    "compact": OscarConfig.compact(),
    "quality": OscarConfig.quality(),
    "high": OscarConfig.high(),
    "4-bit values": OscarConfig(value_bits=4, key_group=16),
    "groups of 64": OscarConfig(key_group=64, key_bits=4),
}
CHANNELS = ((64, 64), (128, 128), (64, 128), (128, 64))
DTYPES = (torch.float16, torch.bfloat16)
FEW = [
    ("compact", (128, 128), torch.bfloat16),
    ("quality", (64, 128), torch.float16),
    ("high", (64, 64), torch.bfloat16),
    ("4-bit values", (128, 64), torch.float16),
    ("groups of 64", (64, 64), torch.bfloat16),
]


@pytest.fixture(autouse=True)
def _blocks_with_different_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, as if there were one of five SMs."""
    if not GPU:
        monkeypatch.setattr(cuda_pack, "multiprocessors", lambda device: 5)


@needs_compiler
@pytest.mark.parametrize(
    ("config", "channels", "dtype"),
    itertools.product(CONFIGS, CHANNELS, DTYPES) if GPU else FEW,
)
def test_pages_are_as_good_as_the_references(
    config: str, channels: tuple[int, int], dtype: torch.dtype
) -> None:
    layout = PageLayout(CONFIGS[config], channels[0], 3, channels[1])
    keys, values = page_states("norm_imbalance", 4, 3, *channels, dtype)
    pack_checks.check_quality(pack_into, keys, values, layout)


@needs_compiler
def test_what_no_field_covers_is_zero() -> None:
    layout = PageLayout(OscarConfig(), 64, 1)
    keys, values = page_states("gaussian", 2, 1, 64, 64, torch.float16)
    pages, expected = (
        pack(pack_into, keys, values, layout),
        codec.encode_pages(keys, values, layout),
    )
    end = layout.fields["value_unit"].offset
    assert torch.equal(pages[..., end:], expected[..., end:])


@needs_compiler
def test_channels_of_large_mean() -> None:
    """Those of keys; of values channel 0, which becomes the mean of the others."""
    layout = PageLayout(OscarConfig(), 64, 2)
    keys, values = page_states("gaussian", 2, 2, 64, 64, torch.float32)
    keys[..., 7] += 100
    values[..., 0] += 30
    keys, values = keys.half(), values.half()
    pack_checks.check_quality(pack_into, keys, values, layout)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_reading_is_unbiased_and_every_code_is_used(kind: str, bits: int) -> None:
    pack_checks.check_unbiased(pack_into, kind, bits, torch.float16)


@needs_compiler
@pytest.mark.parametrize("rows", [slice(5, 9), slice(None)])
def test_zero_tokens_read_as_zeros(rows: slice) -> None:
    layout = PageLayout(OscarConfig(), 64, 2)
    pack_checks.check_zero_tokens(pack_into, layout, rows, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 17])
def test_a_token_that_is_not_finite_is_stored_as_zeros(number: float, channel: int) -> None:
    """Channel 0 is left out of the rotation of values."""
    layout = PageLayout(OscarConfig(), 64, 2)
    pack_checks.check_not_finite(pack_into, layout, number, channel, torch.float16)


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_of_a_prompt_go_straight_into_a_pool(head_dim: int) -> None:
    pack_checks.check_prompt(pack_into, head_dim, torch.float16)
    pack_checks.check_left_out(pack_into, head_dim, torch.float16)


@needs_compiler
def test_pages_of_very_different_magnitude() -> None:
    layout = PageLayout(OscarConfig(), 64, 1)
    keys, values = page_states("gaussian", 5, 1, 64, 64, torch.float32)
    for page, (of_keys, of_values) in enumerate(
        ((1e-5, 1e-18), (1e-2, 1e-9), (1.0, 1.0), (30.0, 1e9), (1e3, 1e18))
    ):
        keys[page] *= of_keys
        values[page] *= of_values
    keys, values = keys.bfloat16(), values.bfloat16()
    pages, expected = (
        pack(pack_into, keys, values, layout),
        codec.encode_pages(keys, values, layout),
    )
    assert torch.equal(codec.value_units(pages, layout), codec.value_units(expected, layout))
    for codes in (codec.key_codes, codec.value_codes):
        assert (codes(pages, layout) == codes(expected, layout)).float().mean() > 0.99


@needs_compiler
def test_values_too_large_for_a_fit_are_stored_as_zeros() -> None:
    layout = PageLayout(OscarConfig(), 64, 1)
    keys, values = page_states("gaussian", 1, 1, 64, 64, torch.bfloat16)
    values[0, 0, 5] *= 1e25
    read = codec.decode_pages(pack(pack_into, keys, values, layout), layout)
    assert not read[0][0, 0, 5].any()
    assert not read[1][0, 0, 5].any()
    assert relative_error(read[1][0, 0, :5], values[0, 0, :5]) < 0.5


@needs_compiler
def test_keys_too_large_for_their_scale_stay_finite() -> None:
    """`check_finite` refuses them; without it they cost their page's accuracy, and no more."""
    layout = PageLayout(OscarConfig(), 64, 1)
    keys, values = page_states("gaussian", 2, 1, 64, 64, torch.bfloat16)
    keys[0, 0, 7] *= 1e12
    read, _ = codec.decode_pages(pack(pack_into, keys, values, layout), layout)
    assert read.isfinite().all()
    assert relative_error(read[1], keys[1].float()) < 0.5


@needs_compiler
def test_groups_that_do_not_vary() -> None:
    layout = PageLayout(OscarConfig(), 64, 1)
    keys, values = page_states("gaussian", 1, 1, 64, 64, torch.bfloat16)
    keys[:] = keys[:, :, :1]
    values[..., 1:] = 0  # rotated, all channels are equal
    read = codec.decode_pages(pack(pack_into, keys, values, layout), layout)
    for found, exact in zip(read, (keys, values)):
        assert relative_error(found, exact.float()) < 2**-4  # half a step of E4M3


@needs_compiler
@pytest.mark.parametrize("tokens", [0, 127])
def test_no_whole_page(tokens: int) -> None:
    layout = PageLayout(OscarConfig(), 64, 2)
    pool = torch.full((1, 2, layout.page_bytes), 255, dtype=torch.uint8, device=DEVICE)
    states = torch.zeros(1, 2, tokens, 64, dtype=torch.float16, device=DEVICE)
    ids = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    pack_into(pool, ids, states, states, layout, pages=0)
    assert (pool == 255).all()


def test_declines_what_it_was_not_made_for() -> None:
    def taken(
        states: Tensor, values: Tensor | None = None, layout: PageLayout | None = None
    ) -> bool:
        values = states if values is None else values
        return takes(states, values, layout or PageLayout(OscarConfig(), 64, 2))

    usual = torch.zeros(1, 2, 256, 64, dtype=torch.float16)
    assert taken(usual)
    assert taken(usual.transpose(1, 2).contiguous().transpose(1, 2))
    assert taken(usual[:, :, 3:])
    assert not taken(usual.float())
    assert not taken(usual, usual.bfloat16())
    assert not taken(usual.mT.contiguous().mT)
    assert not taken(torch.zeros(1, 2, 256, 65, dtype=torch.float16)[..., :64])
    assert not taken(torch.zeros(1 + usual.numel(), dtype=torch.float16)[1:].view(usual.shape))
    assert not taken(usual, layout=PageLayout(OscarConfig.paper(), 64, 2))


@pytest.mark.parametrize(
    ("config", "channels", "reason"),
    [
        *((config, (128, 64), None) for config in CONFIGS.values()),
        (OscarConfig(), (96, 64), "head_dim=96"),
        (OscarConfig(), (64, 80), "value_head_dim=80"),
        (OscarConfig(value_group=32), (64, 64), "value_group=32"),
        (OscarConfig(fit="minmax"), (64, 64), "fit='minmax'"),
        (OscarConfig(metadata="fp16"), (64, 64), "metadata='fp16'"),
        (OscarConfig(token_scale="none"), (64, 64), "token_scale='none'"),
        (OscarConfig(token_scale_exponent=0.5), (64, 64), "token_scale_exponent=0.5"),
    ],
)
def test_says_which_pages_it_cannot_write(
    config: OscarConfig, channels: tuple[int, int], reason: str | None
) -> None:
    found = unsupported(PageLayout(config, channels[0], 2, channels[1]))
    assert found is None if reason is None else found is not None and reason in found


@needs_compiler
def test_the_backend_packs_prompts_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with Triton what it does not take."""
    calls = []

    def counted(*args: object, **kwargs: object) -> None:
        calls.append(args)
        pack_into(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(cuda_backend, "cuda_pack", SimpleNamespace(takes=takes, pack_into=counted))
    keys, values = (torch.randn(1, 2, 300, 64, device=DEVICE, dtype=torch.float16) for _ in "kv")
    for config, expected in ((OscarConfig(), 1), (OscarConfig.paper(), 0)):
        calls.clear()
        packed = quantize(keys[:, :, :0], values[:, :, :0], config)
        cuda_backend.append(packed, keys, values)
        assert len(calls) == expected
        wanted = quantize(keys, values, config).dense()
        for found, one in zip(packed.dense(), wanted):
            assert relative_error(found.float(), one.float()) < 0.05
