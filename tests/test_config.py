"""Presets, validation and the exact size of what they store."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from oscar_kv import OscarConfig, quantize
from oscar_kv.config import PRESETS
from oscar_kv.storage.layout import PageLayout

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 576)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key_bits", 3),
        ("key_bits", 2.0),
        ("token_scale_exponent", True),
        ("value_bits", 8),
        ("key_group", 48),
        ("key_group", 256),
        ("value_group", 4),
        ("value_group", 32.0),
        ("fit", "kmeans"),
        ("metadata", "fp32"),
        ("token_scale", "global"),
        ("token_scale_exponent", 1.5),
        ("token_scale_exponent", "1"),
        ("recent_tokens", -1),
        ("sink_tokens", 1.5),
        ("sink_tokens", True),
        ("check_finite", "yes"),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{field}={value!r}.*expected"):
        OscarConfig(**{field: value})  # pyright: ignore[reportArgumentType]


def test_config_is_frozen_hashable_and_round_trips() -> None:
    config = OscarConfig.quality()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.key_bits = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(OscarConfig.quality())
    assert OscarConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown OscarConfig fields"):
        OscarConfig.from_dict({"bits": 2})
    with pytest.raises(ValueError, match="preset='tiny'"):
        OscarConfig.preset("tiny")


def test_bits_per_element_of_the_presets() -> None:
    assert OscarConfig() == OscarConfig.compact()
    assert OscarConfig.compact().bits_per_element(128, 8) <= 2.22
    assert OscarConfig.paper().bits_per_element(128, 8) == pytest.approx(3.016, abs=0.02)
    assert OscarConfig.quality().bits_per_element(128, 8) == pytest.approx(2.38, abs=0.03)
    assert OscarConfig.high().bits_per_element(128, 8) == pytest.approx(3.19, abs=0.03)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_bits_per_element_are_the_bytes_allocated(preset: str, head_dim: int) -> None:
    config = dataclasses.replace(OscarConfig.preset(preset), recent_tokens=0)
    for heads in (1, 3, 8):
        states = torch.randn(1, heads, 256, head_dim)
        packed = quantize(states, states, config)
        bits = config.bits_per_element(head_dim, heads)
        assert packed.pool.data.numel() * 8 == round(bits * 2 * states.numel(), 6)
        kinds = packed.memory()
        pages = sum(kinds[kind] for kind in ("codes", "metadata", "norms", "padding"))
        assert pages == packed.pool.data.numel()
        assert kinds["codes"] * 8 == (config.key_bits + config.value_bits) * states.numel()


def test_different_value_head_dim() -> None:
    bits = OscarConfig.compact().bits_per_element(192, 4, 128)
    layout = PageLayout(OscarConfig.compact(), 192, 4, 128)
    assert bits == layout.page_bytes * 8 / (128 * (192 + 128))


def test_value_group_is_the_nearest_divisor() -> None:
    assert OscarConfig(value_group=32).value_group_for(128) == 32
    assert OscarConfig(value_group=32).value_group_for(80) == 40
    assert OscarConfig().value_group_for(80) == 80


@pytest.mark.parametrize("head_dim", [0, 8, 20, -64, 64.0])
def test_a_head_dim_without_layout_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim="):
        OscarConfig().bits_per_element(head_dim, 8)


def test_fields_neither_overlap_nor_leave_the_page() -> None:
    for preset in PRESETS:
        for head_dim in HEAD_DIMS:
            layout = PageLayout(OscarConfig.preset(preset), head_dim, 3)
            end = 0
            for field in layout.fields.values():
                assert field.offset >= end
                assert field.offset % 16 == 0
                end = field.offset + field.nbytes
            assert end <= layout.page_bytes
            assert layout.page_bytes % 128 == 0
