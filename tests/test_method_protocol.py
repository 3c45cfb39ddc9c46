"""What every method keeps to: its exact tokens, blocks that stand alone, published bits, a name."""

from __future__ import annotations

import pytest
import torch

from oscar_kv.config import OscarConfig
from oscar_kv.evaluation.methods import (
    FP8,
    KIVI,
    METHODS,
    LayerStates,
    Method,
    Oscar,
    RotateKV,
    method,
    view,
)
from oscar_kv.evaluation.names import parse_name


def calibrated(one: Method) -> Method:
    states = LayerStates(*(torch.randn(1, h, 64, 128) for h in (4, 2, 2)))
    return one.for_layer(states) if one.needs_calibration else one


@pytest.mark.parametrize("name", METHODS)
def test_full_precision_tokens_and_blocks(name: str) -> None:
    """Sinks, window and unfilled blocks are exact; blocks do not depend on how many there are."""
    one = calibrated(METHODS[name])
    keys, values = torch.randn(2, 2, 800, 128), torch.randn(2, 2, 800, 128)
    seen = view(one, keys, values)
    count, sinks = one.quantized_tokens(800), one.sink_tokens
    assert count % one.block_tokens == 0
    assert 800 - sinks - one.recent_tokens - count in range(one.block_tokens)
    part = slice(sinks, sinks + count)
    for found, exact in ((seen.keys, keys), (seen.values, values)):
        rest = torch.ones(800, dtype=torch.bool)
        rest[part] = False
        assert torch.equal(found[:, :, rest], exact[:, :, rest])
        error = (found[:, :, part] - exact[:, :, part]).norm() / exact[:, :, part].norm()
        assert 0.01 < error < 0.6
    half = count // one.block_tokens // 2 * one.block_tokens
    whole = one.quantize(keys[:, :, part], values[:, :, part], 1)
    pieces = [
        one.quantize(keys[:, :, rows], values[:, :, rows], 1)
        for rows in (slice(sinks, sinks + half), slice(sinks + half, sinks + count))
    ]
    torch.testing.assert_close(whole.keys, torch.cat([p.keys for p in pieces], 2))
    torch.testing.assert_close(whole.values, torch.cat([p.values for p in pieces], 2))
    assert whole.bits == sum(p.bits for p in pieces)
    assert one.source


def test_bits_per_element_of_published_settings() -> None:
    """Quantized tokens alone, head_dim 128, 8 KV heads, against what the papers state."""
    expected = {
        "fp8": 8, "fp8-token": 8.25, "int4": 4.25, "kivi": 3, "quarot": 2.25, "rotatekv": 2.25,
        "turboquant-2": 2.125, "turboquant-2.5": 2.625, "turboquant-3": 3.125, "kvarn": 2.375,
        "kitty": 2.38, "oscar-eigen": 2.25, "paper": 3.03, "compact": 2.22, "quality": 2.41,
        "high": 3.22,
    }  # fmt: skip
    keys = torch.randn(1, 8, 256, 128)
    for name, bits in expected.items():
        found = calibrated_for(METHODS[name], 8).quantize(keys, keys, 1).bits / (2 * keys.numel())
        assert found == pytest.approx(bits, abs=0.005), name
    # 4 of 256 tokens in full precision cost 16 bits instead of 2.25
    sinks = view(RotateKV(sink_tokens=4), keys, keys).bits_per_element
    assert sinks == pytest.approx((252 * 2.25 + 4 * 16) / 256)


def calibrated_for(one: Method, heads: int) -> Method:
    states = LayerStates(*(torch.randn(1, heads, 32, 128) for _ in range(3)))
    return one.for_layer(states) if one.needs_calibration else one


def test_names() -> None:
    assert method("kivi:group=64,recent_tokens=128") == KIVI(group=64, recent_tokens=128)
    assert method("fp8:scale=token") == FP8(scale="token")
    changed = method("compact:recent_tokens=0,fit=minmax")
    assert changed == Oscar(config=OscarConfig(recent_tokens=0, fit="minmax"))
    assert parse_name("x:a=[1,2],b=null") == ("x", {"a": (1, 2), "b": None})
    assert METHODS["kivi"].parameters()["class"] == "KIVI"
    for bad in ("nobody", "kivi:", "kivi:group", "kivi:groups=2", "compact:bits=2"):
        if bad != "kivi:":
            with pytest.raises(ValueError, match="expected"):
                method(bad)
    assert method("kivi:") == KIVI()
