"""KVarN-style: rotate, then bring every token and every channel of a tile to unit deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oscar_kv.core.grid import round_fp16
from oscar_kv.core.rotation import rotate, rotate_back
from oscar_kv.evaluation.methods.base import Coded, Method, Quantized, minmax_coded, quantized


@dataclass(frozen=True, kw_only=True)
class KVarN(Method):
    """A Hadamard rotation, alternating normalization of tokens and channels, a min/max grid.

    Tiles of 128 tokens of one head. Keys take a grid per channel, values one per token; the
    deviation along the other axis is stored beside it, that along the same one is part of the
    grid. "Style", because it was written from descriptions: the published code stops at its best
    iteration and keeps a pool of outlier tokens.

    Attributes:
        bits: of a code.
        iterations: how often both axes are normalized.
        block_tokens: tokens of a tile.
    """

    bits: int = 2
    iterations: int = 16
    block_tokens: int = 128
    source: ClassVar[str] = "KVarN, arXiv 2606.03458, section on dual-scaling normalization"

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        return quantized(self._coded(keys, grid_dim=-2), self._coded(values, grid_dim=-1))

    def _coded(self, x: Tensor, grid_dim: int) -> Coded:
        tiles = rotate(x).unflatten(2, (-1, self.block_tokens))
        by_token, by_channel = deviations(tiles, self.iterations)
        kept, folded = (by_token, by_channel) if grid_dim == -2 else (by_channel, by_token)
        kept = round_fp16(kept)
        # The grid is fitted to the normalized tile and stored in the units of what is folded in.
        group = tiles.shape[grid_dim]
        read, bits = minmax_coded(tiles / kept / folded, grid_dim, group, self.bits)
        read = rotate_back((read * folded * kept).flatten(2, 3))
        return Coded(read, bits + 16 * kept.numel())


def deviations(x: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors that leave the rows and columns of ``x / rows / columns`` with unit deviation.

    Args:
        x: ``[..., T, D]``.
        iterations: of normalizing the columns, then the rows.

    Returns:
        ``[..., T, 1]`` and ``[..., 1, D]``.
    """
    rows, columns = torch.ones_like(x[..., :1]), torch.ones_like(x[..., :1, :])
    for _ in range(iterations):
        columns = columns * _deviation(x / rows / columns, -2)
        rows = rows * _deviation(x / rows / columns, -1)
    return rows, columns


def _deviation(x: Tensor, dim: int) -> Tensor:
    deviation = x.std(dim, correction=0, keepdim=True)
    return deviation.where(deviation > 1e-6, 1.0)
