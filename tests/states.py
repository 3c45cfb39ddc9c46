"""Synthetic keys and values with the statistics that make quantization hard."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("gaussian", "outlier_channels", "norm_imbalance")


def states(kind: str, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values ``shape = [B, H, T, D]`` of the given kind, float32."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if kind == "outlier_channels":
        channels = torch.randperm(shape[-1], generator=generator)[: max(1, shape[-1] // 32)]
        keys[..., channels] = keys[..., channels] * 15 + 8
    elif kind == "norm_imbalance":
        keys *= torch.exp(1.5 * torch.randn(*shape[:-1], 1, generator=generator))
        values *= torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
        keys[:, :, ::97] *= 1e-3  # low-norm attention sinks
    return keys, values


def slope(read: Tensor, exact: Tensor) -> float:
    """Slope of the least-squares line of ``read`` on ``exact``, in float64."""
    x, y = exact.double().flatten(), read.double().flatten()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())
