"""Checks of new tokens before anything of them is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_states(
    states: dict[str, Tensor],
    channels: dict[str, int],
    batch_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Checks keys and values ``[B, H, T, channels]``; returns T.

    Raises:
        ValueError: for wrong shapes or devices.
        TypeError: for another dtype than ``dtype``.
    """
    tokens = states["keys"].shape[2] if states["keys"].ndim == 4 else -1
    for name, tensor in states.items():
        if tuple(tensor.shape) != (batch_size, num_kv_heads, tokens, channels[name]):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}: expected [B, H, T, channels] = "
                f"[{batch_size}, {num_kv_heads}, T, {channels[name]}], the same T for keys and "
                "values"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{name} are {tensor.dtype}: this cache holds {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}: this cache is on {device}")
    return tokens


def check_lengths(lengths: Sequence[int] | None, batch_size: int, tokens: int) -> list[int]:
    """New tokens of each sequence as a list; raises ValueError unless within ``[0, tokens]``."""
    if lengths is None:
        return [tokens] * batch_size
    counts = [int(length) for length in lengths]
    if len(counts) != batch_size or any(not 0 <= count <= tokens for count in counts):
        raise ValueError(f"lengths={counts}: expected {batch_size} numbers in [0, {tokens}]")
    return counts


def require_finite(keys: Tensor, values: Tensor, counts: Sequence[int]) -> None:
    """Raises ValueError if one of the first ``counts[b]`` tokens of a sequence has NaN or Inf."""
    tokens = torch.arange(keys.shape[2], device=keys.device)
    counted = tokens < torch.tensor(counts, device=keys.device).view(-1, 1, 1)
    bad = ~_finite_tokens(keys, values) & counted
    if bad.any():
        row, head, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"keys or values hold NaN or Inf, first in sequence {row}, KV head {head}, new token "
            f"{token}: expected finite numbers (check_finite=False stores such tokens as zeros)"
        )


def zero_nonfinite(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with every token that holds NaN or Inf replaced by zeros, per KV head."""
    keep = _finite_tokens(keys, values).unsqueeze(-1)
    return torch.where(keep, keys, 0), torch.where(keep, values, 0)


def _finite_tokens(keys: Tensor, values: Tensor) -> Tensor:
    return keys.isfinite().all(-1) & values.isfinite().all(-1)
