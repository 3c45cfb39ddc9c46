"""Ours as a method: presets read what packed pages hold, and so does the ablation of them."""

from __future__ import annotations

import pytest
import torch

from oscar_kv.config import PRESETS
from oscar_kv.evaluation.methods import METHODS, Ablation, Oscar, view
from oscar_kv.evaluation.names import parse_name
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV

_AS_ABLATION = {
    "compact": Ablation(),
    "quality": Ablation(key_group=32),
    "high": Ablation(key_bits=4),
    "paper": Ablation(
        key_fit="minmax",
        value_fit="minmax",
        unbiased_norm=False,
        metadata="fp16",
        key_group=32,
        value_group=32,
        token_scale="cross_head",
        recent_tokens=0,
    ),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_packed_pages_and_the_ablation_reads_the_same(preset: str) -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 2, 700, 64, generator=generator)
    keys *= torch.exp(torch.randn(2, 2, 700, 1, generator=generator))
    values = torch.randn(2, 2, 700, 64, generator=generator) + 0.3
    ours, taken_apart = METHODS[preset], _AS_ABLATION[preset]
    assert isinstance(ours, Oscar)
    packed = PackedKV(ours.config, batch_size=2, num_kv_heads=2, head_dim=64)
    packed.append(keys, values)
    seen, apart = view(ours, keys, values), view(taken_apart, keys, values)
    for found, exact in zip((seen.keys, seen.values), packed.dense()):
        torch.testing.assert_close(found, exact)
    torch.testing.assert_close(apart.keys, seen.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart.values, seen.values, rtol=1e-4, atol=1e-5)

    layout = PageLayout(ours.config, 64, 2)
    pages = sum(packed.pages_per_sequence) * 2
    tail = sum(packed.tails_per_sequence) * 2 * 2 * 64 * 16
    elements = 2 * 2 * 700 * 2 * 64
    assert seen.bits_per_element == pytest.approx((pages * layout.page_bytes * 8 + tail) / elements)
    padding = pages * (layout.page_bytes - layout.bytes_by_kind()["padding"]) * 8
    used = (padding + tail) / elements
    # a float32 may take up to 12 bytes more between fields that are aligned to 16
    assert apart.bits_per_element == pytest.approx(used, abs=0.01)


def test_every_knob_of_the_ablation_changes_what_is_read() -> None:
    keys, values = torch.randn(1, 2, 256, 32), torch.randn(1, 2, 256, 32)
    keys *= torch.exp(torch.randn(1, 2, 256, 1))
    base = Ablation(recent_tokens=0)
    plain = view(base, keys, values)
    changes = [
        "rotation=false", "token_scale=none", "token_scale=cross_head", "exponent=0.5",
        "unbiased_norm=false", "key_fit=minmax", "key_fit=least_squares", "key_fit=energy",
        "value_fit=minmax", "value_fit=least_squares", "value_fit=energy", "key_bits=3",
        "key_bits=4", "value_bits=3", "value_bits=4", "key_group=32", "value_group=8",
        "metadata=fp16", "sink_tokens=4", "recent_tokens=128",
    ]  # fmt: skip
    for change in changes:
        found = view(base.replaced(**parse_name(f"x:{change}")[1]), keys, values)
        assert not torch.equal(found.keys, plain.keys) or not torch.equal(
            found.values, plain.values
        ), change
    for field, value in {
        "key_bits": 5,
        "metadata": "fp4",
        "key_group": 48,
        "block_tokens": 64,
    }.items():
        with pytest.raises(ValueError, match="expected"):
            Ablation(**{field: value})  # pyright: ignore[reportArgumentType]


def test_three_bits_and_corrections_in_numbers() -> None:
    """Slopes on normal data: least squares shrinks, energy half as much, unbiased not at all."""
    keys = torch.randn(1, 4, 1024, 64)
    slopes, errors = {}, {}
    for fit in ("least_squares", "energy", "unbiased"):
        for bits in (2, 3):
            coded = Ablation(
                token_scale="none", unbiased_norm=False, key_fit=fit, key_bits=bits,
                metadata="fp16", recent_tokens=0,
            )  # fmt: skip
            read = coded.quantize(keys, keys, 0).keys
            slopes[fit, bits] = float((read * keys).sum() / keys.square().sum())
            errors[fit, bits] = float((read - keys).square().mean())
    # the distortion of the best uniform quantizers of a normal distribution: 0.1188 and 0.0374
    assert slopes["least_squares", 2] == pytest.approx(1 - 0.1188, abs=0.01)
    assert slopes["least_squares", 3] == pytest.approx(1 - 0.0374, abs=0.005)
    assert errors["least_squares", 3] == pytest.approx(0.0374, abs=0.004)
    for bits in (2, 3):
        expected = slopes["least_squares", bits] ** 0.5
        assert slopes["energy", bits] == pytest.approx(expected, abs=0.005)
        assert slopes["unbiased", bits] == pytest.approx(1, abs=0.005)
        assert errors["least_squares", bits] < errors["unbiased", bits]
