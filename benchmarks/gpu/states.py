"""Keys, values and packed caches to measure on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.timing import copies_for
from oscar_kv import OscarConfig, quantize
from oscar_kv.storage.packed import PackedKV

_UNREAD = ("tables", "undo", "unused")


def config_of(preset: str, recent_tokens: int | None = None) -> OscarConfig:
    """A preset, with another recent window if one is given.

    Without the check for NaN and Inf, which waits for the device: that is for inputs that might
    hold some.
    """
    config = dataclasses.replace(OscarConfig.preset(preset), check_finite=False)
    if recent_tokens is None:
        return config
    return dataclasses.replace(config, recent_tokens=recent_tokens)


def random_states(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, kind: str = "gaussian"
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, T, D]``.

    Args:
        kind: ``"gaussian"``, or ``"model"``: keys with a few large, shifted channels, token norms
            that vary, and a first token of small norm with a small value, as models have them.
    """
    keys = torch.randn(tuple(shape), device=device, dtype=dtype)
    values = torch.randn(tuple(shape), device=device, dtype=dtype)
    if kind == "model":
        keys[..., :: shape[3] // 4] = keys[..., :: shape[3] // 4] * 4 + 6
        keys *= torch.exp(0.3 * torch.randn(*shape[:3], 1, device=device)).to(dtype)
        keys[:, :, 0] *= 0.1
        values[:, :, 0] *= 0.01
    return keys, values


def bytes_read(packed: PackedKV) -> int:
    """Bytes that a decode step over ``packed`` cannot avoid reading: pages and tails in use."""
    return sum(count for kind, count in packed.memory().items() if kind not in _UNREAD)


def packed_copies(
    keys: Tensor, values: Tensor, config: OscarConfig, lengths: Sequence[int] | None = None
) -> list[PackedKV]:
    """The states, quantized, in as many separate memories as keep the L2 cache cold."""
    packed = quantize(keys, values, config, lengths=lengths)
    more = copies_for(bytes_read(packed)) - 1
    # no deepcopy: it would share the pages
    return [packed, *(quantize(keys, values, config, lengths=lengths) for _ in range(more))]


def dense_copies(keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same for plain states."""
    more = copies_for(keys.nbytes + values.nbytes) - 1
    return [(keys, values), *((keys.clone(), values.clone()) for _ in range(more))]
