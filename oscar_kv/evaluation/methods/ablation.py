"""Ours taken apart: every step a knob, in terms of :mod:`oscar_kv.core`.

For studies only; what a cache stores is :class:`~oscar_kv.evaluation.methods.oscar.Oscar`. Where a
setting is one of the presets both read the same numbers (tests/test_ablation.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.core.grid import Grid, Rounding, fit_minmax, fit_unbiased, round_fp8, round_fp16
from oscar_kv.core.rotation import rotate, rotate_back
from oscar_kv.core.scaling import token_scale, unbiased_token_scale
from oscar_kv.evaluation.methods.base import Coded, Method, Quantized, quantized
from oscar_kv.evaluation.methods.oscar import from_pages, to_pages
from oscar_kv.storage.codec import VALUE_PEAK

Fit = Literal["minmax", "least_squares", "energy", "unbiased"]
LEVELS = {1: 2, 1.6: 3, 2: 4, 3: 8, 4: 16}
"""By bits of a code. Five codes of three levels are a byte: ``3**5 = 243``."""
STEPS = {2: 1.596, 3: 1.224, 8: 0.586}
"""By levels that no preset has: step of the best uniform grid for normal data of deviation one."""
_METADATA: dict[str, tuple[Rounding, int]] = {"fp8": (round_fp8, 8), "fp16": (round_fp16, 16)}
_CHOICES = {
    "token_scale": ("per_head", "cross_head", "none"),
    "key_fit": ("minmax", "least_squares", "energy", "unbiased"),
    "value_fit": ("minmax", "least_squares", "energy", "unbiased"),
    "key_bits": (2, 3, 4),
    "value_bits": (1, 1.6, 2, 3, 4),
    "metadata": ("fp8", "fp16"),
}


@dataclass(frozen=True, kw_only=True)
class Ablation(Method):
    """OScaR with any of its steps left out or replaced. The defaults are ``compact``.

    Attributes:
        rotation: whether keys and values are rotated.
        token_scale: what one key scale covers, as in :class:`~oscar_kv.OscarConfig`.
        exponent: alpha, the norm's exponent in the token scale.
        unbiased_norm: whether token scales are corrected so that ``<k, k_hat> = <k, k>``.
        key_fit, value_fit: ``"minmax"`` is the paper's grid. The others take the codes of the
            unbiased fit and differ in the step ``a``: ``"least_squares"`` is ``cov / var(q)``,
            ``"energy"`` keeps the variance, ``"unbiased"`` is ``var / cov``.
        key_bits: 2, 3 (a plane of two bits and one of one bit) or 4.
        value_bits: likewise, or 1, or 1.6: three levels.
        key_group: tokens that share a grid; divides 128.
        value_group: channels that share a grid; the whole head if ``None``.
        metadata: what scales and centres are rounded to.
    """

    rotation: bool = True
    token_scale: Literal["per_head", "cross_head", "none"] = "per_head"
    exponent: float = 1.0
    unbiased_norm: bool = True
    key_fit: Fit = "unbiased"
    value_fit: Fit = "unbiased"
    key_bits: int = 2
    value_bits: float = 2
    key_group: int = 128
    value_group: int | None = None
    metadata: Literal["fp8", "fp16"] = "fp8"
    recent_tokens: int = 128
    block_tokens: int = PAGE_TOKENS
    source: ClassVar[str] = "OScaR, arXiv 2605.19660, section 4, and docs/how-it-works.md"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {accepted}")
        if self.value_bits == 1.6 and self.value_fit == "minmax":
            raise ValueError("value_bits=1.6: expected another value_fit than 'minmax'")
        if self.block_tokens != PAGE_TOKENS or PAGE_TOKENS % self.key_group:
            raise ValueError(f"expected pages of {PAGE_TOKENS} tokens and a key_group dividing it")

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        turn, turn_back = (rotate, rotate_back) if self.rotation else (_same, _same)
        coded = (
            self._keys(turn(to_pages(keys))),
            self._values(turn(to_pages(values))),
        )
        back = (Coded(from_pages(turn_back(c.read), keys.shape[0]), c.bits) for c in coded)
        return quantized(*back)

    def _keys(self, keys: Tensor) -> Coded:
        rounding, metadata_bits = _METADATA[self.metadata]
        scale = token_scale(keys, self.token_scale, self.exponent, self.metadata == "fp8")
        unit = keys / scale
        grouped = unit.unflatten(2, (-1, self.key_group))
        grid = fit_grid(grouped, -2, self.key_bits, self.key_fit, rounding)
        if self.unbiased_norm:
            read = grid.reconstruct().flatten(2, 3)
            scale = unbiased_token_scale(scale, unit, read, self.token_scale)
            if self.token_scale == "cross_head":
                scale = scale.amax(1, keepdim=True)
        pages, heads, tokens, _ = keys.shape
        scales = {"per_head": heads * tokens, "cross_head": tokens, "none": heads}
        bits = _code_bits(keys, self.key_bits) + 2 * metadata_bits * grid.scale.numel()
        read = _stored(grid, self.key_bits, rounding).flatten(2, 3)
        return Coded(read * scale, bits + 16 * pages * scales[self.token_scale])

    def _values(self, values: Tensor) -> Coded:
        rounding, metadata_bits = _METADATA[self.metadata]
        peak = values.abs().amax((-2, -1), keepdim=True)
        unit = torch.exp2(torch.ceil(torch.log2(peak / VALUE_PEAK)))
        grouped = (values / unit).unflatten(-1, (-1, self.value_group or values.shape[-1]))
        grid = fit_grid(grouped, -1, self.value_bits, self.value_fit, rounding)
        bits = _code_bits(values, self.value_bits) + 2 * metadata_bits * grid.scale.numel()
        read = _stored(grid, self.value_bits, rounding).flatten(-2)
        return Coded(read * unit, bits + 32 * unit.numel())


def fit_grid(x: Tensor, dim: int, bits: float, fit: Fit, rounding: Rounding) -> Grid:
    """A grid of any kind; see :class:`Ablation`. Arguments as in :func:`fit_minmax`."""
    levels = LEVELS[bits]
    if fit == "minmax":
        return fit_minmax(x, dim, int(bits), rounding)
    if levels in STEPS:
        codes = _codes(x, dim, levels)
    else:
        grid = fit_unbiased(x, dim, int(bits), rounding)
        if fit == "unbiased":
            return grid
        codes = grid.codes.float()
    deviation, code_deviation = (t - t.mean(dim, keepdim=True) for t in (x, codes))
    variance = deviation.square().mean(dim, keepdim=True)
    code_variance = code_deviation.square().mean(dim, keepdim=True)
    covariance = (deviation * code_deviation).mean(dim, keepdim=True)
    steps = {
        "least_squares": covariance / code_variance,
        "energy": (variance / code_variance).sqrt(),
        "unbiased": variance / covariance,
    }
    scale = rounding(torch.where(covariance > 0, steps[fit], 0.0))
    half = (levels - 1) / 2
    middle = rounding(x.mean(dim, keepdim=True) - scale * (codes.mean(dim, keepdim=True) - half))
    return Grid(codes.to(torch.uint8), scale, middle - scale * half)


def _codes(x: Tensor, dim: int, levels: int) -> Tensor:
    """A grid for normal data, as :func:`fit_unbiased` at 2 bits.

    With eight levels its middle is half way towards that of the range; with fewer it is the mean.
    """
    centred = x - x.mean(dim, keepdim=True)
    step = STEPS[levels] * centred.square().mean(dim, keepdim=True).sqrt()
    low, high = torch.aminmax(centred, dim=dim, keepdim=True)
    middle = (low + high) / 4 if levels == 8 else 0.0
    position = (centred - middle) / step.clamp_min(torch.finfo(x.dtype).tiny)
    return (position + (levels - 1) / 2).round_().clamp_(0, levels - 1)


def _code_bits(pages: Tensor, bits: float) -> int:
    """Of the codes of ``[pages, H, tokens, channels]``, in whole bytes for each page and head."""
    codes = pages[0, 0].numel()
    each = 8 * math.ceil(codes / 5) if bits == 1.6 else codes * int(bits)
    return pages.shape[:2].numel() * each


def _stored(grid: Grid, bits: float, rounding: Rounding) -> Tensor:
    """What a page gives back: its middle is what was rounded (storage/layout.py)."""
    half = (LEVELS[bits] - 1) / 2
    return (grid.codes - half) * grid.scale + rounding(grid.zero + grid.scale * half)


def _same(x: Tensor) -> Tensor:
    return x
