"""What ``oscar-kv diagnose`` measures of a layer, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from oscar_kv.core.attention import attention
from oscar_kv.evaluation.capture import CapturedAttention
from oscar_kv.evaluation.diagnose import (
    QUERIES,
    SMALLEST,
    measure_channels,
    measure_groups,
    measure_layer,
    measure_norms,
    steps,
)
from oscar_kv.evaluation.methods import Ablation, LayerStates, method


def test_norms_by_hand() -> None:
    norms = torch.full((256,), 4.0)
    norms[0], norms[5], norms[200] = 1.0, 2.0, 12.0
    kinds = ["text"] * 200 + ["image"] * 56
    norms[201:] = 6.0
    found = measure_norms(norms, kinds)
    assert (found.minimum, found.median, found.maximum) == (1, 4, 12)
    assert found.low == [0]  # 2 is half of the median, not less
    assert found.large == [200]
    assert found.group_ratio == 4  # of the first 128; of the others 12 / 4
    assert found.median_by_kind == {"text": 4, "image": 6}
    mean = (1 + 2 + 198 * 4 + 12 + 55 * 6) / 256
    squares = (1 + 4 + 198 * 16 + 144 + 55 * 36) / 256
    assert found.variation == pytest.approx(math.sqrt(squares - mean**2) / mean)


def test_norms_of_zero_have_no_ratio() -> None:
    norms = torch.ones(128)
    norms[3] = 0
    found = measure_norms(norms, ["text"] * 128)
    assert found.group_ratio is None
    assert found.low == [3]
    assert found.median_by_kind == {}


def test_channels_by_hand() -> None:
    x = torch.ones(4, 4)
    x[:, 2] = 5.0
    x[1::2] *= -1
    found = measure_channels(x)
    assert found.peak == pytest.approx(5 / 2)
    assert found.kurtosis == pytest.approx(((3 + 625) / 4) / ((3 + 25) / 4) ** 2)
    zero = measure_channels(torch.zeros(4, 4))
    assert (zero.peak, zero.kurtosis) == (1, 3)


def test_groups_by_hand() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    read = torch.tensor([[3.0, 4.0], [0.0, 0.0], [2.0, 1.0], [1.0, 2.0]])
    found = measure_groups(exact, read, 2)
    assert found.whole == pytest.approx(math.sqrt(3 / 34))
    assert found.worst_group == pytest.approx(math.sqrt(2 / 8))
    assert found.median_group == pytest.approx(math.sqrt(1 / 26))
    assert found.worst_token == 1


def imbalanced(outlier: float = 1.0, spread: float = 0.0) -> CapturedAttention:
    """One layer of two KV heads with a channel outlier, or norms that vary."""
    generator = torch.Generator().manual_seed(0)
    length = SMALLEST + 40
    keys, values = torch.randn(2, 1, 2, length, 64, generator=generator)
    keys[..., 7] += outlier * keys[..., 7].sign()
    keys *= torch.exp(spread * torch.randn(length, 1, generator=generator))
    queries = torch.randn(1, 4, length, 64, generator=generator)
    return CapturedAttention(LayerStates(queries, keys, values), None, None, None, None)


def test_each_step_helps_against_what_it_is_for() -> None:
    plain, rotation, scaling, fit, large = (name for name, _ in steps(64))
    layer = measure_layer(0, imbalanced(spread=1.0), ["text"] * (SMALLEST + 40))
    for head in layer.heads:
        found = head.key_groups
        assert found[scaling].worst_token < 0.5 * found[rotation].worst_token
        assert head.norms.variation > 0.5
        assert head.norms.group_ratio is not None
        assert head.norms.group_ratio > 20
    layer = measure_layer(0, imbalanced(outlier=20), ["text"] * (SMALLEST + 40))
    for head in layer.heads:
        assert head.keys.peak > 10 > 4 > head.rotated_keys.peak
        assert head.keys.kurtosis > 20 > head.rotated_keys.kurtosis
    for one in (fit, large):
        assert layer.heads[0].value_groups[one].whole < layer.heads[0].value_groups[plain].whole


def test_errors_are_those_of_the_quantizer() -> None:
    captured = imbalanced(outlier=3)
    queries, keys, values = captured.states
    layer = measure_layer(3, captured, ["text"] * keys.shape[2])
    name, step = steps(64)[-1]
    read = step.quantize(keys[:, :, :128], values[:, :, :128], 0)
    keys_read = torch.cat([read.keys, keys[:, :, 128:]], 2)
    values_read = torch.cat([read.values, values[:, :, 128:]], 2)
    last = queries[:, :, -QUERIES:]
    exact = attention(last, keys, values)
    found = layer.steps[-1]
    assert (layer.index, found.name) == (3, name)
    assert found.bits == pytest.approx(read.bits / (2 * 2 * 128 * 64))
    for seen, measured in (
        ((keys_read, values), found.keys),
        ((keys, values_read), found.values),
        ((keys_read, values_read), found.both),
    ):
        expected = (attention(last, *seen) - exact).norm() / exact.norm()
        assert measured == pytest.approx(float(expected), rel=1e-4)
    both = attention(last, keys_read, values_read) - exact
    by_head = both[:, 2:].norm() / exact[:, 2:].norm()  # two query heads of the second KV head
    assert layer.heads[1].attention[name] == pytest.approx(float(by_head), rel=1e-4)


def test_the_last_step_is_compact() -> None:
    assert steps(64)[-1][1] == Ablation()
    assert steps(64)[0][1] == method(
        "ablation:rotation=false,token_scale=none,key_fit=minmax,value_fit=minmax,"
        "unbiased_norm=false,metadata=fp16,key_group=32,value_group=32"
    )
    assert steps(80)[0][1].value_group == 40


def test_states_that_are_not_finite() -> None:
    captured = imbalanced()
    captured.states.keys[0, 1, 5, 3] = torch.inf
    with pytest.raises(ValueError, match="layer 4: its keys or values are not finite"):
        measure_layer(4, captured, ["text"] * (SMALLEST + 40))
