"""Ours as a method: presets read what packed pages hold, and so does the ablation of them."""

from __future__ import annotations

import pytest
import torch

from oscar_kv.config import PRESETS
from oscar_kv.core.grid import round_fp16
from oscar_kv.evaluation.methods import METHODS, Ablation, Oscar, view
from oscar_kv.evaluation.methods.ablation import fit_grid
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
        "key_bits=4", "value_bits=1", "value_bits=1.6", "value_bits=3", "value_bits=4",
        "key_group=32", "value_group=8",
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


def test_one_bit_and_three_levels_by_hand() -> None:
    """Four values of mean 1: codes, steps ``var / cov``, and their bits."""
    x = torch.tensor([[0.0, 0.5, 1.0, 2.5]])
    # 0 0 0 1: variance 0.875, covariance 1.5 / 4; the mean of the codes is 1/4
    step = 0.875 / 0.375
    expected = [1 - step / 4] * 3 + [1 + 3 * step / 4]
    found = fit_grid(x, -1, 1, "unbiased", round_fp16).reconstruct()
    assert found[0].tolist() == pytest.approx(expected, rel=1e-3)
    # steps of 1.224 deviations of 0.935, the middle one about the mean: 0 1 1 2
    step = 0.875 / ((1 + 1.5) / 4)
    expected = [1 - step, 1, 1, 1 + step]
    found = fit_grid(x, -1, 1.6, "unbiased", round_fp16).reconstruct()
    assert found[0].tolist() == pytest.approx(expected, rel=1e-3)
    # a page and head of 128 x 24 values: 3,072 bits, or 615 bytes of five codes
    states = torch.randn(1, 2, 256, 24)
    bits = {b: Ablation(value_bits=b).quantize(states, states, 0).bits for b in (1, 1.6, 2)}
    assert bits[2] - bits[1] == 2 * 2 * 128 * 24
    assert bits[1.6] - bits[1] == 2 * 2 * (615 * 8 - 128 * 24)
    with pytest.raises(ValueError, match="another value_fit"):
        Ablation(value_bits=1.6, value_fit="minmax")


def test_steps_and_corrections_in_numbers() -> None:
    """Slopes on normal data: least squares shrinks, energy half as much, unbiased not at all."""
    states = torch.randn(1, 2, 256, 1024)
    # the distortion of the best uniform quantizers of a normal distribution (Max, 1960)
    distortions = {1: 0.3634, 1.6: 0.1902, 2: 0.1188, 3: 0.0374}
    for bits, distortion in distortions.items():
        slopes, errors = {}, {}
        for fit in ("least_squares", "energy", "unbiased"):
            coded = Ablation(value_fit=fit, value_bits=bits, metadata="fp16")
            read = coded.quantize(states, states, 0).values
            slopes[fit] = float((read * states).sum() / states.square().sum())
            errors[fit] = float((read - states).square().mean())
            if bits in (2, 3):
                keys = Ablation(
                    token_scale="none", unbiased_norm=False, key_fit=fit, key_bits=int(bits),
                    metadata="fp16",
                ).quantize(states, states, 0).keys  # fmt: skip
                slope = float((keys * states).sum() / states.square().sum())
                assert slope == pytest.approx(slopes[fit], abs=0.01)
        assert errors["least_squares"] == pytest.approx(distortion, abs=0.006)
        assert slopes["least_squares"] == pytest.approx(1 - distortion, abs=0.01)
        assert slopes["energy"] == pytest.approx(slopes["least_squares"] ** 0.5, abs=0.005)
        assert slopes["unbiased"] == pytest.approx(1, abs=0.005)
        assert errors["least_squares"] < errors["unbiased"]
