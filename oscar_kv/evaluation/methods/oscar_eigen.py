"""OSCAR-style (Together's, arXiv 2605.17757, not this project): rotations made from calibration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oscar_kv.core.attention import attention
from oscar_kv.core.rotation import rotation_matrix
from oscar_kv.evaluation.methods.base import (
    Coded,
    LayerStates,
    Method,
    Quantized,
    minmax_coded,
    quantized,
)

CLIPS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""What calibration chooses the clipping factor from."""


@dataclass(frozen=True, kw_only=True)
class OscarEigen(Method):
    """Eigenvectors of what attention weighs errors by, then Hadamard, then a grid per token.

    **Needs calibration**: queries, keys and values of every layer on other text. Keys are rotated
    by the eigenvectors of ``Q^T Q``, values by those of ``(S V)^T (S V)``, S the attention
    probabilities; both per KV head, composed with a Hadamard rotation. Clipping factors are the
    best of :data:`CLIPS` on the calibration text. Without the bit-reversal permutation, which does
    not matter where one grid covers a head.

    Attributes:
        bits: of a code.
    """

    bits: int = 2
    sink_tokens: int = 64
    recent_tokens: int = 256
    source: ClassVar[str] = "OSCAR, arXiv 2605.17757, section 3"
    needs_calibration: ClassVar[bool] = True

    def for_layer(self, states: LayerStates | None) -> Method:
        if states is None:
            raise ValueError("OscarEigen needs calibration: expected the states of the layer")
        queries, keys, values = (part.float() for part in states)
        heads = keys.shape[1]
        exact = attention(queries, keys, values)
        key_rotation, by_query = _rotation(_per_kv_head(queries, heads))
        value_rotation, _ = _rotation(_per_kv_head(exact, heads))

        def logit_error(clip: float) -> Tensor:
            error = _rotated_coded(keys, key_rotation, self.bits, clip).read - keys
            return torch.einsum("bhtd,hde,bhte->", error, by_query, error)

        def output_error(clip: float) -> Tensor:
            read = _rotated_coded(values, value_rotation, self.bits, clip).read
            return (attention(queries, keys, read) - exact).square().sum()

        return _Calibrated(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            key_rotation=key_rotation,
            value_rotation=value_rotation,
            key_clip=min(CLIPS, key=logit_error),
            value_clip=min(CLIPS, key=output_error),
        )

    def table_bits(self, num_kv_heads: int, head_dim: int) -> int:
        """Both rotations in 16 bits."""
        return 2 * 16 * num_kv_heads * head_dim**2

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        raise ValueError("OscarEigen is not calibrated: call for_layer() first")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Calibrated(OscarEigen):
    key_rotation: Tensor
    value_rotation: Tensor
    key_clip: float
    value_clip: float

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        return quantized(
            _rotated_coded(keys, self.key_rotation, self.bits, self.key_clip),
            _rotated_coded(values, self.value_rotation, self.bits, self.value_clip),
        )


def _per_kv_head(x: Tensor, heads: int) -> Tensor:
    """``[B, Hq, T, D]`` to ``[H, n, D]``: all vectors that meet each KV head."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)


def _rotation(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """``[H, n, D]`` to eigenvectors times Hadamard ``[H, D, D]``, and the second moments."""
    moments = vectors.mT @ vectors / vectors.shape[1]
    basis = torch.linalg.eigh(moments.double()).eigenvectors.float()
    return basis @ rotation_matrix(vectors.shape[-1], device=vectors.device), moments


def _rotated_coded(x: Tensor, rotation: Tensor, bits: int, clip: float) -> Coded:
    read, stored = minmax_coded(x @ rotation, -1, x.shape[-1], bits, clip)
    return Coded(read @ rotation.mT, stored)
