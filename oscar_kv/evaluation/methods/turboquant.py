"""TurboQuant, its variant for the squared error: a random rotation and one fixed codebook."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from oscar_kv.core.grid import round_fp16
from oscar_kv.evaluation.methods.base import Coded, Method, Quantized, quantized


@dataclass(frozen=True, kw_only=True)
class TurboQuant(Method):
    """Norm and direction apart: the direction is rotated at random and every coordinate takes the
    nearest entry of the Lloyd-Max codebook of a coordinate on the sphere.

    Attributes:
        bits: per coordinate; a fraction gives that share of the coordinates one bit more. Which
            coordinates does not matter after a random rotation; the paper gives them to outlier
            channels, which it rotates apart.
        norm: ``"plain"`` stores the norm ``|x|``; ``"energy"`` what makes the read vector as long
            as ``x`` (the norm correction of vLLM); ``"unbiased"`` what makes ``<x, x_hat> =
            <x, x>``, which is our correction given to this method.
        seed: of the rotation, the same in all layers.
    """

    bits: float = 2.0
    norm: Literal["plain", "energy", "unbiased"] = "plain"
    seed: int = 0
    source: ClassVar[str] = "TurboQuant, arXiv 2504.19874, algorithm 1 (TurboQuant_mse)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: expected 1 to 8")
        if self.norm not in ("plain", "energy", "unbiased"):
            raise ValueError(f"norm={self.norm!r}: expected 'plain', 'energy' or 'unbiased'")

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        return quantized(self._coded(keys), self._coded(values))

    def _coded(self, x: Tensor) -> Coded:
        dim = x.shape[-1]
        rotation = random_rotation(dim, self.seed).to(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        direction = x @ rotation / norm.where(norm > 0, 1.0)
        low = int(self.bits)
        wider = round((self.bits - low) * dim)
        parts = direction.split([wider, dim - wider], -1)
        books = (codebook(dim, low + 1), codebook(dim, low))
        read = torch.cat([_nearest(part, book) for part, book in zip(parts, books)], -1)
        if self.norm == "energy":
            norm = norm / torch.linalg.vector_norm(read, dim=-1, keepdim=True)
        elif self.norm == "unbiased":
            norm = norm / (direction * read).sum(-1, keepdim=True).clamp_min(1e-3)
        codes = x.numel() // dim * (wider * (low + 1) + (dim - wider) * low)
        return Coded(round_fp16(norm) * read @ rotation.T, codes + 16 * norm.numel())


@cache
def random_rotation(dim: int, seed: int) -> Tensor:
    """A uniformly random orthogonal matrix, float32 ``[dim, dim]``: QR of a Gaussian one."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


@cache
def codebook(dim: int, bits: int) -> Tensor:
    """The Lloyd-Max codebook of one coordinate of a random unit vector, float32 ``[2**bits]``.

    Its density is proportional to ``(1 - x**2) ** ((dim - 3) / 2)`` (lemma 1 of the paper), close
    to a normal one of variance ``1 / dim``.
    """
    width = min(1.0, 10 * dim**-0.5)  # ten deviations
    x = torch.linspace(-width, width, 20_001, dtype=torch.float64)
    density = (1 - x.square()).clamp_min(0).pow((dim - 3) / 2)
    centres = torch.linspace(-2, 2, 2**bits, dtype=torch.float64) * dim**-0.5
    for _ in range(200):
        cell = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
        mass = torch.zeros_like(centres).index_add(0, cell, density)
        centres = torch.zeros_like(centres).index_add(0, cell, density * x) / mass
    return centres.float()


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Every entry of ``x`` replaced by the nearest of the ascending ``centres``."""
    centres = centres.to(x)
    return centres[torch.bucketize(x.contiguous(), (centres[1:] + centres[:-1]) / 2)]
