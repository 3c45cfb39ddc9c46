"""The grids: the paper's bit for bit, the unbiased one unbiased."""

from __future__ import annotations

import pytest
import torch
from states import KINDS, slope, states
from torch import Tensor

from oscar_kv import OscarConfig, quantize
from oscar_kv.core.grid import FITS, fit_minmax, fit_unbiased, round_fp8, round_fp16
from oscar_kv.core.rotation import rotate
from oscar_kv.storage.codec import quantize_keys, quantize_values
from oscar_kv.storage.layout import PageLayout


def paper_grid(x: Tensor, rounding: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One group after the other, by the paper's formula: codes, scales, zeros of ``[N, n]``."""
    codes, scales, zeros = [], [], []
    for group in x:
        low, high = group.min(), group.max()
        scale = ((high - low) / 3).to(rounding).float()
        if scale == 0:  # all alike: one step reaches the value
            scale = low.abs().to(rounding).float()
            scale = torch.ones(()) if scale == 0 else scale
        zero_point = torch.round(-low / scale)
        codes.append(torch.clamp(torch.round(group / scale) + zero_point, 0, 3))
        scales.append(scale)
        zeros.append(-zero_point * scale)
    return torch.stack(codes), torch.stack(scales), torch.stack(zeros)


def adversarial_groups() -> dict[str, Tensor]:
    gaussian = torch.randn(400, 32)
    outlier = gaussian.clone()
    outlier[:, 7] *= 300
    constant = torch.randn(50, 1).expand(50, 32).contiguous()
    constant[0] = 0
    return {
        "gaussian": gaussian,
        "huge": gaussian * 1e4,
        "tiny": gaussian * 1e-4,
        "one-token outlier": outlier,
        "constant": constant,
        "nearly constant": 100 + gaussian * 1e-3,
        "one-sided": gaussian.abs() + 5,
        "two values": (gaussian > 0).float() * 3 - 1,
    }


@pytest.mark.parametrize("name", adversarial_groups())
@pytest.mark.parametrize("rounding", [torch.float32, torch.float16])
def test_minmax_is_the_papers_grid_bit_for_bit(name: str, rounding: torch.dtype) -> None:
    torch.manual_seed(0)
    x = adversarial_groups()[name]
    codes, scales, zeros = paper_grid(x, rounding)
    grid = fit_minmax(x, -1, 2, round_fp16 if rounding == torch.float16 else lambda t: t)
    assert torch.equal(grid.codes.float(), codes)
    assert torch.equal(grid.scale.squeeze(-1), scales)
    assert torch.equal(grid.zero.squeeze(-1), zeros)


def test_paper_preset_is_the_papers_pipeline_bit_for_bit() -> None:
    """Rotation, one norm per token over all heads, groups of 32 tokens and of 32 channels."""
    torch.manual_seed(1)
    keys, values = states("norm_imbalance", 2, 3, 128, 64)
    keys, values = rotate(keys), rotate(values)
    layout = PageLayout(OscarConfig.paper(), 64, 3)

    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(keys, dim=-1), dim=1)
    unit = keys / norm.half().float()[:, None, :, None]
    by_channel = unit.unflatten(2, (4, 32)).transpose(-1, -2)  # [2, 3, 4, 64, 32]
    codes, scales, zeros = paper_grid(by_channel.flatten(0, -2), torch.float16)
    found = quantize_keys(keys, layout)
    assert torch.equal(found.grid.codes.transpose(-1, -2).flatten(0, -2).float(), codes)
    assert torch.equal(found.grid.scale.flatten(), scales)
    assert torch.equal(found.grid.zero.flatten(), zeros)
    assert torch.equal(found.token_scale[:, 0, :, 0], norm.half().float())

    codes, scales, zeros = paper_grid(values.unflatten(-1, (2, 32)).flatten(0, -2), torch.float16)
    found = quantize_values(values, layout)
    assert torch.equal(found.grid.codes.flatten(0, -2).float(), codes)
    assert torch.equal((found.grid.scale * found.unit).flatten(), scales)
    assert torch.equal((found.grid.zero * found.unit).flatten(), zeros)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["compact", "quality", "high"])
def test_logits_and_values_are_unbiased(preset: str, kind: str) -> None:
    tokens = 4096
    keys, values = states(kind, 1, 2, tokens + 128, 128)
    read_keys, read_values = quantize(keys, values, OscarConfig.preset(preset)).dense()
    query = torch.randn(1, 2, 4096, 128, generator=torch.Generator().manual_seed(5))
    exact = query @ keys[:, :, :tokens].mT
    assert slope(query @ read_keys[:, :, :tokens].mT, exact) == pytest.approx(1, abs=0.01)
    assert slope(read_values[:, :, :tokens], values[:, :, :tokens]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("dim", "expected"), [(-2, 0.89), (-1, 0.89)])
def test_least_squares_alone_shrinks(dim: int, expected: float) -> None:
    """The bias that the unbiased grid removes is there when its last step is left out."""
    x = torch.randn(64, 128, 128, generator=torch.Generator().manual_seed(0))
    codes = fit_unbiased(x, dim, 2, lambda t: t).codes.float()
    centred = codes - codes.mean(dim, keepdim=True)
    scale = (x * centred).sum(dim, keepdim=True) / centred.square().sum(dim, keepdim=True)
    assert slope(scale * centred, x) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dim", [-1, -2])
def test_unbiased_grid_has_slope_one_in_every_group(bits: int, dim: int) -> None:
    x = torch.randn(20, 64, 96, generator=torch.Generator().manual_seed(2)).exp()
    grid = fit_unbiased(x, dim, bits, lambda t: t)
    centred = x - x.mean(dim, keepdim=True)
    read = grid.reconstruct()
    ratio = (read * centred).sum(dim) / centred.square().sum(dim)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
    torch.testing.assert_close(read.mean(dim), x.mean(dim), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("bits", [2, 4])
def test_every_code_is_used_and_none_is_out_of_range(fit: str, bits: int) -> None:
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(3))
    codes = FITS[fit](x, -1, bits, round_fp8).codes
    assert codes.unique().tolist() == list(range(2**bits))


@pytest.mark.parametrize("fit", FITS)
def test_metadata_is_what_will_be_read(fit: str) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(4))
    grid = FITS[fit](x, -1, 2, round_fp8)
    assert torch.equal(grid.scale, grid.scale.to(torch.float8_e4m3fn).float())
    if fit == "unbiased":
        middle = grid.zero + 1.5 * grid.scale
        assert torch.equal(middle, middle.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("fit", FITS)
def test_degenerate_groups_stay_finite_and_close(fit: str) -> None:
    for name, x in adversarial_groups().items():
        read = FITS[fit](x, -1, 2, round_fp16).reconstruct()
        assert read.isfinite().all(), name
        spread = (x.amax(-1) - x.amin(-1)).clamp_min(x.abs().amax(-1) * 2e-3)
        assert ((read - x).abs().amax(-1) <= 0.7 * spread).all(), name
