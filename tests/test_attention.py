"""Attention from packed pages against the float64 oracle over the unpacked states."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from states import states
from torch import Tensor

from oscar_kv import OscarConfig, PackedKV, decode_attention, extend_attention, quantize
from oscar_kv.config import PRESETS
from oscar_kv.core.attention import attention
from oscar_kv.storage.codec import key_codes, value_codes

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 576)
GROUPS = (1, 2, 3, 4, 8)
# tail only, no page, one page exactly (with and without a window), pages and a tail
LENGTHS = (20, 127, 256, 128, 517)


def ragged(
    config: OscarConfig, head_dim: int, seed: int = 0, value_dim: int | None = None
) -> PackedKV:
    """Two KV heads; token norms differ, but logits stay where float32 keeps five digits."""
    keys, values = states("gaussian", len(LENGTHS), 2, max(LENGTHS), head_dim, seed=seed)
    keys *= torch.exp(0.5 * torch.randn(*keys.shape[:-1], 1))
    if value_dim is not None:
        values = torch.randn(len(LENGTHS), 2, max(LENGTHS), value_dim)
    return quantize(keys, values, config, lengths=LENGTHS)


def oracle(query: Tensor, packed: PackedKV, **options: Any) -> Tensor:
    keys, values = packed.dense(torch.float64)
    return attention(query.double(), keys, values, lengths=torch.tensor(packed.lengths), **options)


def assert_agrees(out: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative error of every sequence."""
    assert out.isfinite().all()
    for found, wanted in zip(out.double(), expected):
        assert torch.linalg.vector_norm(found - wanted) <= tolerance * wanted.norm() + 1e-12


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_decode_and_extend_agree_with_the_oracle(preset: str, head_dim: int, group: int) -> None:
    packed = ragged(OscarConfig.preset(preset), head_dim, seed=group)
    for tokens in (1, 3):
        query = torch.randn(len(LENGTHS), 2 * group, tokens, head_dim)
        assert_agrees(decode_attention(query, packed), oracle(query, packed))
    query = torch.randn(len(LENGTHS), 2 * group, 19, head_dim)
    assert_agrees(extend_attention(query, packed), oracle(query, packed))


def test_all_four_codes_are_there() -> None:
    for preset in PRESETS:
        packed = ragged(OscarConfig.preset(preset), 64)
        for codes, bits in (
            (key_codes(packed.pool.data, packed.layout), packed.config.key_bits),
            (value_codes(packed.pool.data, packed.layout), packed.config.value_bits),
        ):
            assert codes.unique().tolist() == list(range(2**bits))


OPTIONS: dict[str, dict[str, Any]] = {
    "scaling": {"scaling": 0.3},
    "softcap": {"softcap": 2.0},
    "sliding window": {"sliding_window": 70},
    "left padding": {"starts": torch.tensor([3, 100, 0, 127, 300])},
    "attention sinks": {"s_aux": torch.tensor([1.0, -2.0, 30.0, 0.0, 5.0, -40.0])},
    "all": {
        "scaling": 0.2,
        "softcap": 5.0,
        "sliding_window": 200,
        "starts": torch.tensor([0, 100, 5, 2, 400]),
        "s_aux": torch.linspace(-2, 2, 6),
    },
}


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sinks", [0, 5])
def test_options_agree_with_the_oracle(options: dict[str, Any], tokens: int, sinks: int) -> None:
    for preset in ("compact", "paper"):
        config = dataclasses.replace(OscarConfig.preset(preset), sink_tokens=sinks)
        packed = ragged(config, 64)
        query = torch.randn(len(LENGTHS), 6, tokens, 64)
        assert_agrees(decode_attention(query, packed, **options), oracle(query, packed, **options))


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("additive", [False, True])
def test_any_mask(heads: int, additive: bool) -> None:
    packed = ragged(OscarConfig.compact(), 64)
    query = torch.randn(len(LENGTHS), 6, 7, 64)
    shape = (len(LENGTHS), heads, 7, max(LENGTHS))
    exists = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).view(-1, 1, 1, 1)
    if additive:
        mask = torch.randn(shape) * 3
        full = mask.masked_fill(~exists, -torch.inf)
    else:
        mask = torch.rand(shape) > 0.4
        full = mask & exists
    assert_agrees(extend_attention(query, packed, mask=mask), oracle(query, packed, mask=full))


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_a_token_scale_spread_over_any_number_of_heads(heads: int) -> None:
    keys, values = states("norm_imbalance", 2, heads, 300, 64)
    packed = quantize(keys * 0.1, values, OscarConfig.paper(), lengths=[300, 130])
    query = torch.randn(2, 2 * heads, 3, 64)
    assert_agrees(decode_attention(query, packed), oracle(query, packed))


def test_queries_before_the_start_of_their_sequence_see_nothing() -> None:
    keys, values = states("gaussian", 2, 2, 50, 64)
    packed = quantize(keys, values, lengths=[0, 50])
    query = torch.randn(2, 4, 3, 64)
    out = decode_attention(query, packed)
    assert not out[0].any()
    assert_agrees(out, oracle(query, packed))


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    packed = ragged(OscarConfig.compact(), 64)
    query = torch.randn(len(LENGTHS), 2, 1, 64)
    mask = torch.ones(len(LENGTHS), 1, 1, max(LENGTHS), dtype=torch.bool)
    mask[1] = False
    out = decode_attention(query, packed, mask=mask)
    assert not out[1].any()
    assert out[0].any()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tokens", [5, 20])
def test_new_tokens_are_seen_exactly(preset: str, tokens: int) -> None:
    packed = ragged(OscarConfig.preset(preset), 64)
    new_keys, new_values = states("gaussian", len(LENGTHS), 2, tokens, 64, seed=9)
    query = torch.randn(len(LENGTHS), 6, tokens, 64)
    keys, values = packed.dense(torch.float64)
    for row, length in enumerate(LENGTHS):
        keys[row, :, length - tokens : length] = new_keys[row]
        values[row, :, length - tokens : length] = new_values[row]
    expected = attention(query.double(), keys, values, lengths=torch.tensor(LENGTHS))
    assert_agrees(extend_attention(query, packed, new_keys, new_values), expected)


def test_values_of_another_head_dim() -> None:
    packed = ragged(OscarConfig.compact(), 192, value_dim=128)
    query = torch.randn(len(LENGTHS), 4, 2, 192)
    out = decode_attention(query, packed)
    assert out.shape == (len(LENGTHS), 4, 2, 128)
    assert_agrees(out, oracle(query, packed))


def test_many_pages_and_many_queries_go_through_several_blocks() -> None:
    keys, values = states("gaussian", 2, 4, 5000, 64)
    packed = quantize(keys, values)
    for tokens in (1, 100):
        query = torch.randn(2, 16, tokens, 64) * 3
        assert_agrees(extend_attention(query, packed), oracle(query, packed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    keys, values = states("gaussian", 2, 2, 700, 64)
    packed = quantize(keys.to(dtype), values.to(dtype))
    query = torch.randn(2, 4, 1, 64).to(dtype)
    out = decode_attention(query, packed)
    assert out.dtype == dtype
    keys, values = packed.dense(torch.float64)
    expected = attention(query.double(), keys, values)
    assert_agrees(out, expected, 4 * torch.finfo(dtype).eps)


def test_the_oracle_is_plain_attention() -> None:
    query = torch.randn(2, 6, 9, 32, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 2, 40, 32, dtype=torch.float64)
    causal = torch.ones(9, 40, dtype=torch.bool).tril(31)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=causal, enable_gqa=True
    )
    torch.testing.assert_close(attention(query, keys, values), expected)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"query": torch.zeros(5, 6, 1, 32)}, "query="),
        ({"query": torch.zeros(4, 6, 1, 64)}, "query="),
        ({"query": torch.zeros(5, 5, 1, 64)}, "query="),
        ({"query": torch.zeros(5, 6, 64)}, "query="),
        ({"query": torch.zeros(5, 6, 0, 64)}, "query holds 0"),
        ({"query": torch.zeros(5, 6, 518, 64)}, "query holds 518"),
        ({"packed": (torch.zeros(1), torch.zeros(1))}, "packed is a tuple"),
        ({"starts": torch.zeros(5)}, "starts="),
        ({"sliding_window": 2.5}, "sliding_window=2.5"),
        ({"mask": torch.ones(5, 1, 1, 517, dtype=torch.long)}, "mask is torch.int64"),
        ({"query": torch.zeros(5, 6, 1, 64).long()}, "query is torch.int64"),
        ({"new_keys": torch.zeros(5, 2, 1, 64)}, "both or neither"),
        (
            {"new_keys": torch.zeros(5, 2, 2, 64), "new_values": torch.zeros(5, 2, 1, 64)},
            "new_keys=",
        ),
        ({"s_aux": torch.zeros(2)}, "s_aux="),
        ({"starts": torch.zeros(2)}, "starts="),
        ({"sliding_window": 0}, "sliding_window="),
        ({"softcap": 0.0}, "softcap="),
        ({"mask": torch.ones(5, 1, 1, 3, dtype=torch.bool)}, "mask="),
        ({"mask": torch.ones(5, 3, 1, 600, dtype=torch.bool)}, "mask="),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: str) -> None:
    packed = ragged(OscarConfig.compact(), 64)
    arguments = {"query": torch.randn(5, 6, 1, 64), "packed": packed, **change}
    with pytest.raises((ValueError, TypeError), match=error):
        extend_attention(**arguments)


def test_decode_attention_is_for_few_queries() -> None:
    packed = quantize(*states("gaussian", 1, 2, 40, 64))
    with pytest.raises(ValueError, match="use extend_attention"):
        decode_attention(torch.randn(1, 2, 17, 64), packed)
