"""What the tests of a single layer share: random states, a layer that holds some, a comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oscar_kv import OscarConfig
from oscar_kv.integrations.layer import OscarLayer

HEADS, HEAD_DIM = 2, 32
CHUNK = 200
"""So many new tokens on top of 380 are in part packed at once."""


def states(length: int, batch: int = 2, seed: int = 0, **like: Any) -> tuple[Tensor, Tensor]:
    """Random keys and values ``[batch, 2, length, 32]``."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, length, HEAD_DIM, generator=generator)
    return keys.to(**like), values.to(**like)


def filled_layer(length: int = 300, config: OscarConfig | None = None, **more: Any) -> OscarLayer:
    layer = OscarLayer(OscarConfig() if config is None else config)
    layer.update(*states(length, **more))
    return layer


def dense(layer: OscarLayer) -> tuple[Tensor, Tensor]:
    assert layer.packed is not None
    return layer.packed.dense()


def assert_same_states(a: OscarLayer, b: OscarLayer) -> None:
    assert a.packed is not None
    assert b.packed is not None
    assert a.packed.pages_per_sequence == b.packed.pages_per_sequence
    for one, other in zip(dense(a), dense(b), strict=True):
        assert torch.equal(one, other)
