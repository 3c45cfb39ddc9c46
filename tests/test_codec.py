"""Tokens to page bytes and back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from states import KINDS, states

from oscar_kv import OscarConfig
from oscar_kv.config import PRESETS
from oscar_kv.core.rotation import rotate, rotate_back
from oscar_kv.storage.codec import (
    decode_pages,
    encode_pages,
    key_codes,
    quantize_keys,
    quantize_values,
    value_codes,
)
from oscar_kv.storage.layout import PageLayout

CONFIGS = {
    **{name: OscarConfig.preset(name) for name in PRESETS},
    "4-bit values, cross-head fp8": OscarConfig(value_bits=4, token_scale="cross_head"),
    "no token scale": OscarConfig(token_scale="none", key_group=16),
    "half exponent": OscarConfig(token_scale_exponent=0.5, value_group=16),
    "minmax fp8": OscarConfig(fit="minmax", value_group=64),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 48), (128, 128), (192, 128)])
def test_bytes_hold_exactly_what_was_quantized(
    config: OscarConfig, head_dim: int, value_dim: int
) -> None:
    layout = PageLayout(config, head_dim, 3, value_dim)
    keys = states("norm_imbalance", 4, 3, 128, head_dim, seed=1)[0]
    values = states("norm_imbalance", 4, 3, 128, value_dim, seed=2)[1]
    pages = encode_pages(keys, values, layout)
    quantized_keys = quantize_keys(rotate(keys), layout)
    quantized_values = quantize_values(rotate(values), layout)
    assert torch.equal(key_codes(pages, layout), quantized_keys.grid.codes.flatten(2, 3))
    assert torch.equal(value_codes(pages, layout), quantized_values.grid.codes.flatten(3))
    read_keys, read_values = decode_pages(pages, layout)
    expected = quantized_keys.grid.reconstruct().flatten(2, 3) * quantized_keys.token_scale
    # minmax keeps the paper's zero exact; storage then rounds it to the metadata's precision
    tolerance = 1e-5 if config.fit == "unbiased" else 1e-3 if config.metadata == "fp16" else 0.04
    _assert_close(read_keys, rotate_back(expected), tolerance)
    expected = (quantized_values.grid.reconstruct() * quantized_values.unit).flatten(3)
    _assert_close(read_values, rotate_back(expected), tolerance)


def _assert_close(read: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(read - exact) <= tolerance * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_error(preset: str, kind: str) -> None:
    keys, values = states(kind, 4, 2, 128, 128)
    layout = PageLayout(OscarConfig.preset(preset), 128, 2)
    read_keys, read_values = decode_pages(encode_pages(keys, values, layout), layout)
    for read, exact, limit in (
        (read_keys, keys, 0.2 if preset == "high" else 0.45),
        (read_values, values, 0.45),
    ):
        error = torch.linalg.vector_norm(read - exact) / torch.linalg.vector_norm(exact)
        assert 0.01 < error < limit


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("metadata", ["fp8", "fp16"])
def test_error_does_not_depend_on_magnitude(scale: float, metadata: str) -> None:
    config = OscarConfig(metadata=metadata)  # pyright: ignore[reportArgumentType]
    layout = PageLayout(config, 64, 2)
    keys, values = states("gaussian", 3, 2, 128, 64)
    plain = decode_pages(encode_pages(keys, values, layout), layout)
    scaled = decode_pages(encode_pages(keys * scale, values * scale, layout), layout)
    for exact, read, read_scaled in zip((keys, values), plain, scaled):
        error, error_scaled = (read - exact).norm(), (read_scaled / scale - exact).norm()
        assert float(error_scaled) == pytest.approx(float(error), rel=0.02)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_token_of_zeros_reads_as_zeros(config: OscarConfig) -> None:
    layout = PageLayout(config, 64, 2)
    keys, values = states("gaussian", 1, 2, 128, 64)
    keys[:, :, 17] = 0
    values[:, :, 40] = 0
    read_keys, read_values = decode_pages(encode_pages(keys, values, layout), layout)
    assert not read_keys[:, :, 17].any()
    assert not read_values[:, :, 40].any()
    assert read_keys[:, :, 16].any()


def test_a_page_of_zeros_reads_as_zeros() -> None:
    for config in CONFIGS.values():
        layout = PageLayout(config, 64, 2)
        zeros = torch.zeros(1, 2, 128, 64)
        for read in decode_pages(encode_pages(zeros, zeros, layout), layout):
            assert not read.any()


def test_token_scale_recovers_tokens_of_small_norm() -> None:
    """Token Norm Imbalance: without the scale, quiet tokens drown in the group's range."""
    keys, values = states("norm_imbalance", 4, 1, 128, 128)
    errors = {}
    for mode in ("per_head", "none"):
        layout = PageLayout(dataclasses.replace(OscarConfig(), token_scale=mode), 128, 1)
        read, _ = decode_pages(encode_pages(keys, values, layout), layout)
        error = torch.linalg.vector_norm(read - keys, dim=-1) / torch.linalg.vector_norm(
            keys, dim=-1
        )
        errors[mode] = error.median()
    assert errors["per_head"] < 0.5 * errors["none"]


def test_half_precision_states_and_float64_reading() -> None:
    layout = PageLayout(OscarConfig.compact(), 64, 2)
    keys, values = states("gaussian", 1, 2, 128, 64)
    pages = encode_pages(keys.bfloat16(), values.bfloat16(), layout)
    wide, narrow = decode_pages(pages, layout, torch.float64), decode_pages(pages, layout)
    for a, b in zip(wide, narrow):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a.float(), b)
    assert decode_pages(pages, layout, torch.bfloat16)[0].dtype == torch.bfloat16
