"""Every method against its definition, written out here in NumPy loops, and its bits by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from oscar_kv.core.attention import attention
from oscar_kv.evaluation.methods import (
    FP8,
    KIVI,
    OTT,
    Int4,
    Kitty,
    KVarN,
    LayerStates,
    OscarEigen,
    QuaRot,
    RotateKV,
    TurboQuant,
    view,
)
from oscar_kv.evaluation.methods.base import minmax_coded
from oscar_kv.evaluation.methods.turboquant import codebook, random_rotation

H, T, D = 2, 8, 4


def small(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, H, T, D, generator=generator)
    keys[..., 1] *= 7  # an outlier channel
    return keys, torch.randn(1, H, T, D, generator=generator)


def grid(x: np.ndarray, bits: int, clip: float = 1.0) -> np.ndarray:
    """Round to nearest between the float16 minimum and steps of a float16 scale."""
    low, high = x.min() * clip, x.max() * clip
    low = float(np.float16(low))
    scale = float(np.float16((high - low) / (2**bits - 1)))
    codes = np.clip(np.round((x - low) / scale), 0, 2**bits - 1)
    return codes * scale + low


def by_groups(x: np.ndarray, axis: int, group: int, bits: int, clip: float = 1.0) -> np.ndarray:
    """:func:`grid` over consecutive entries along ``axis`` of ``[H, T, D]``."""
    out = np.empty_like(x)
    for head in range(x.shape[0]):
        for other in range(x.shape[2 if axis == 1 else 1]):
            for begin in range(0, x.shape[axis], group):
                part = slice(begin, begin + group)
                at = (head, part, other) if axis == 1 else (head, other, part)
                out[at] = grid(x[at], bits, clip)
    return out


def hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def check(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found[0].double().numpy(), expected, rtol=1e-4, atol=1e-4)


def numpy_states(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    keys, values = small(seed)
    return keys[0].double().numpy(), values[0].double().numpy()


# -- by hand --------------------------------------------------------------------------------


def test_minmax_grid_in_numbers() -> None:
    # low 0.1 is 0.0999756 in float16; the step 0.9667 is 0.9667969: codes 0 1 2 3
    read, bits = minmax_coded(torch.tensor([[0.1, 1.0, 2.2, 3.0]]), -1, 4, 2)
    step, low = 0.966796875, 0.0999755859375
    assert read[0].tolist() == pytest.approx([low, low + step, low + 2 * step, low + 3 * step])
    assert bits == 4 * 2 + 16 + 16
    constant, _ = minmax_coded(torch.full((1, 4), 0.5), -1, 4, 2)
    assert constant.tolist() == [[0.5] * 4]
    with pytest.raises(ValueError, match="group=3"):
        minmax_coded(torch.zeros(1, 4), -1, 3, 2)


def test_fp8_in_numbers() -> None:
    # E4M3 has three bits of mantissa: steps of 1/8 at 1, of 32 at 256; it ends at 448
    x = torch.tensor([1.1, -300.0, 1000.0, 0.0]).view(1, 1, 1, 4)
    read = FP8().quantize(x, x, 0)
    assert read.keys.flatten().tolist() == [1.125, -288.0, 448.0, 0.0]
    assert read.bits == 2 * 4 * 8
    # the largest entry, 896, is 448 after division by 2; 300 / 2 = 150 is rounded to 144
    x = torch.tensor([896.0, 300.0, -1.1, 0.0]).view(1, 1, 1, 4)
    read = FP8(scale="token").quantize(x, x, 0)
    assert read.values.flatten().tolist() == [896.0, 288.0, -1.125, 0.0]
    assert read.bits == 2 * (4 * 8 + 32)
    assert FP8(scale="token").quantize(0 * x, x, 0).keys.count_nonzero() == 0
    with pytest.raises(ValueError, match="scale='page'"):
        FP8(scale="page")  # pyright: ignore[reportArgumentType]


def test_int4_in_numbers() -> None:
    x = torch.arange(16.0).view(1, 1, 1, 16)
    read = Int4().quantize(x, 3 - 2 * x, 0)
    assert torch.equal(read.keys, x)
    assert torch.equal(read.values, 3 - 2 * x)
    assert read.bits == 2 * (16 * 4 + 32)


# -- against the definition -----------------------------------------------------------------


def test_int4() -> None:
    keys, values = numpy_states()
    read = Int4().quantize(*small(), 0)
    check(read.keys, by_groups(keys, 2, D, 4))
    check(read.values, by_groups(values, 2, D, 4))


def test_kivi() -> None:
    keys, values = numpy_states()
    read = KIVI(group=2, block_tokens=4).quantize(*small(), 0)
    check(read.keys, by_groups(keys, 1, 2, 2))
    check(read.values, by_groups(values, 2, 2, 2))
    assert read.bits == 2 * (H * T * D * 2 + H * T * D // 2 * 32)


def test_ott() -> None:
    keys, values = numpy_states()
    ours = OTT(group=4, block_tokens=4, outlier_tokens=2)
    read = ours.quantize(*small(), 0)
    expected_keys, expected_values = keys.copy(), values.copy()
    for head in range(H):
        smallest = np.argsort(np.abs(keys[head]).sum(-1))[:2]
        others = np.delete(np.arange(T), smallest)
        filled = keys[head].copy()
        filled[smallest] = keys[head, others].mean(0)
        coded = by_groups(filled[None], 1, 4, 2)[0], by_groups(values[head : head + 1], 2, 4, 2)[0]
        expected_keys[head, others] = coded[0][others]
        expected_values[head, others] = coded[1][others]
    check(read.keys, expected_keys)
    check(read.values, expected_values)
    plain = KIVI(group=4, block_tokens=4).quantize(*small(), 0)
    assert read.bits == plain.bits + H * 2 * (2 * D * 16 + 32)
    # the pool is filled by the prompt
    later = ours.quantize(*small(), T)
    assert torch.equal(later.keys, plain.keys)
    assert later.bits == plain.bits


def test_quarot() -> None:
    keys, values = numpy_states()
    read = QuaRot().quantize(*small(), 0)
    turn = hadamard(D)
    check(read.keys, by_groups(keys @ turn, 2, D, 2, 0.95) @ turn.T)
    check(read.values, by_groups(values @ turn, 2, D, 2, 0.95) @ turn.T)
    assert read.bits == 2 * (H * T * D * 2 + H * T * 32)


def test_rotatekv_turns_heads_together() -> None:
    keys, values = numpy_states()
    read = RotateKV(group=2).quantize(*small(), 0)
    turn = hadamard(H * D)
    for found, x in ((read.keys, keys), (read.values, values)):
        together = x.transpose(1, 0, 2).reshape(1, T, H * D)
        coded = by_groups(together @ turn, 2, 2, 2) @ turn.T
        check(found, coded.reshape(T, H, D).transpose(1, 0, 2))
    assert read.bits == 2 * (H * T * D * 2 + H * T * D // 2 * 32)
    # three heads have no common divisor with four: all three are turned together
    states = torch.randn(1, 3, T, D)
    assert RotateKV().quantize(states, states, 0).keys.shape == states.shape


def test_kitty() -> None:
    keys, values = numpy_states()
    read = Kitty(promoted=0.25, block_tokens=4).quantize(*small(), 0)
    expected = by_groups(keys, 1, 4, 2)
    high = by_groups(keys, 1, 4, 4)
    for head in range(H):
        for begin in (0, 4):
            part = slice(begin, begin + 4)
            loudest = np.abs(keys[head, part]).mean(0).argmax()
            expected[head, part, loudest] = high[head, part, loudest]
    check(read.keys, expected)
    check(read.values, by_groups(values, 2, D, 2))
    grids = H * (T // 4) * D * 32 + H * T * 32
    boosted = H * (T // 4) * (4 * 2 + 2)  # two more bits for four tokens, an index of two bits
    assert read.bits == 2 * H * T * D * 2 + grids + boosted


def test_kvarn() -> None:
    keys, values = numpy_states()
    read = KVarN(iterations=5, block_tokens=4).quantize(*small(), 0)
    turn = hadamard(D)
    for found, x, axis in ((read.keys, keys, 0), (read.values, values, 1)):
        expected = np.empty_like(x)
        for head in range(H):
            for begin in (0, 4):
                tile = x[head, begin : begin + 4] @ turn
                rows, columns = np.ones((4, 1)), np.ones((1, D))
                for _ in range(5):
                    columns = columns * (tile / rows / columns).std(0, keepdims=True)
                    rows = rows * (tile / rows / columns).std(1, keepdims=True)
                kept, folded = (rows, columns) if axis == 0 else (columns, rows)
                kept = kept.astype(np.float16).astype(np.float64)
                coded = by_groups((tile / kept / folded)[None], 1 + axis, 4, 2)[0]
                expected[head, begin : begin + 4] = coded * folded * kept @ turn.T
        check(found, expected)
    tiles = H * T // 4
    assert read.bits == 2 * (H * T * D * 2) + tiles * 2 * (4 * 32 + 4 * 16)


def test_kvarn_brings_both_axes_to_unit_deviation() -> None:
    from oscar_kv.evaluation.methods.kvarn import deviations

    x = torch.randn(3, 128, 64) * torch.rand(3, 128, 1) * torch.rand(3, 1, 64)
    rows, columns = deviations(x, 16)
    for dim in (-1, -2):
        assert (x / rows / columns).std(dim, correction=0).sub(1).abs().max() < 1e-2


def test_turboquant() -> None:
    keys, _ = numpy_states()
    turn = random_rotation(D, 0).double().numpy()
    np.testing.assert_allclose(turn @ turn.T, np.eye(D), atol=1e-6)
    for norm in ("plain", "energy", "unbiased"):
        read = TurboQuant(bits=2.25, norm=norm).quantize(*small(), 0)
        expected = np.empty_like(keys)
        for head, token in np.ndindex(H, T):
            x = keys[head, token]
            length = np.linalg.norm(x)
            direction = x / length @ turn
            books = [codebook(D, 3)] + 3 * [codebook(D, 2)]
            coded = np.array(
                [min(book.tolist(), key=lambda c: abs(c - u)) for u, book in zip(direction, books)]
            )
            if norm == "energy":
                length /= np.linalg.norm(coded)
            if norm == "unbiased":
                length /= coded @ direction
            expected[head, token] = float(np.float16(length)) * coded @ turn.T
        check(read.keys, expected)
        assert read.bits == 2 * H * T * (3 + 3 * 2 + 16)
    for bits in (0.5, 9):
        with pytest.raises(ValueError, match="bits="):
            TurboQuant(bits=bits)
    with pytest.raises(ValueError, match="norm="):
        TurboQuant(norm="l1")  # pyright: ignore[reportArgumentType]


def test_codebooks_are_those_of_the_literature() -> None:
    """Max (1960), table I: the best quantizers of a normal distribution of variance 1."""
    known = {1: [0.7979], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    for bits, half in known.items():
        book = codebook(4096, bits) * 4096**0.5
        expected = [-c for c in reversed(half)] + half
        assert book.tolist() == pytest.approx(expected, abs=4e-3)


def test_unbiased_norms_keep_the_product_of_a_key_with_itself() -> None:
    keys = torch.randn(1, 2, 64, 128)
    slopes = []
    for one in (TurboQuant(), TurboQuant(norm="unbiased")):
        read = one.quantize(keys, keys, 0).keys
        slopes.append((read * keys).sum(-1) / keys.square().sum(-1))
    assert slopes[0].mean() < 0.9
    assert (slopes[1] - 1).abs().max() < 1e-3


def test_oscar_eigen() -> None:
    """Rotations from moments that are known: queries and outputs along the axes."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([4.0, 1.0, 3.0, 2.0])
    queries = torch.randn(1, 4, 4096, D, generator=generator) * weights
    keys = torch.randn(1, H, 4096, D, generator=generator)
    calibrated = OscarEigen(sink_tokens=0, recent_tokens=0).for_layer(
        LayerStates(queries[:, :, :512], keys[:, :, :512], keys[:, :, :512])
    )
    rotation = calibrated.key_rotation  # pyright: ignore[reportAttributeAccessIssue]
    moments = (queries[:, :2, :512].flatten(0, 2).T @ queries[:, :2, :512].flatten(0, 2)) / 1024
    basis = rotation[0] @ torch.from_numpy(hadamard(D)).float()
    turned = basis.T @ moments @ basis
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3 * turned.abs().max()
    assert turned.diagonal().tolist() == sorted(turned.diagonal().tolist())

    small_keys, small_values = small()
    read = calibrated.quantize(small_keys, small_values, 0)
    x = small_keys[0].double().numpy()
    clip = calibrated.key_clip  # pyright: ignore[reportAttributeAccessIssue]
    for head in range(H):
        turn = rotation[head].double().numpy()
        expected = by_groups((x[head] @ turn)[None], 2, D, 2, clip)[0] @ turn.T
        np.testing.assert_allclose(read.keys[0, head].numpy(), expected, rtol=1e-3, atol=1e-3)
    assert read.bits == 2 * (H * T * D * 2 + H * T * 32)
    # both rotations in 16 bits, once per sequence
    assert calibrated.table_bits(H, D) == 2 * H * D * D * 16
    assert view(calibrated, small_keys, small_values).bits_per_element == pytest.approx(
        (read.bits + 2 * H * D * D * 16) / (2 * H * T * D)
    )
    with pytest.raises(ValueError, match="needs calibration"):
        OscarEigen().for_layer(None)
    with pytest.raises(ValueError, match="not calibrated"):
        OscarEigen().quantize(small_keys, small_values, 0)


def test_calibration_picks_the_better_clip() -> None:
    """Of all clipping factors, the one with the smallest error of attention on its text."""
    states = LayerStates(*(torch.randn(1, h, 256, 16) for h in (4, 2, 2)))
    chosen = OscarEigen(sink_tokens=0, recent_tokens=0).for_layer(states)
    exact = attention(*states)

    def error(clip: float) -> float:
        values = dataclasses.replace(chosen, value_clip=clip)  # pyright: ignore
        read = values.quantize(states.keys, states.values, 0).values
        return float((attention(states.queries, states.keys, read) - exact).square().sum())

    best = chosen.value_clip  # pyright: ignore[reportAttributeAccessIssue]
    assert error(best) <= min(error(0.7), error(1.0))
    assert best < 1
