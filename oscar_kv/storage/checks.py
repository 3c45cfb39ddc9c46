"""Checks of new tokens before anything of them is stored."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from oscar_kv.config import OscarConfig
from oscar_kv.storage.layout import PageLayout

_LARGEST = 65504.0  # of float16
_LARGEST_VALUE = 2.0**66  # 64 times the largest unit of a page


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
    counts = as_integers("lengths", lengths)
    if len(counts) != batch_size or any(not 0 <= count <= tokens for count in counts):
        raise ValueError(f"lengths={counts}: expected {batch_size} numbers in [0, {tokens}]")
    return counts


def as_integers(name: str, numbers: Iterable[Any]) -> list[int]:
    """``numbers`` as Python integers; raises TypeError for anything that would be rounded."""
    try:
        return [operator.index(number) for number in numbers]
    except TypeError as error:
        raise TypeError(f"{name}={numbers!r}: expected integers") from error


def require_storable(
    keys: Tensor, values: Tensor, counts: Sequence[int], config: OscarConfig
) -> None:
    """Raises ValueError if a token that counts has NaN or Inf, or is too large for its metadata.

    Token scales are float16: the norm of a key (over all heads where they share it, over
    ``sqrt(D)`` with FP8 metadata) may be at most 65504, a value at most 2**66.
    """
    norm = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    if config.token_scale == "cross_head":
        norm = torch.linalg.vector_norm(norm, dim=1, keepdim=True)
    peak = values.abs().amax(-1).float()
    per_head = keys.shape[-1] ** 0.5 if config.metadata == "fp8" else 1.0
    storable = (norm <= _LARGEST * per_head) & (peak <= _LARGEST_VALUE)  # False for NaN
    tokens = torch.arange(keys.shape[2], device=keys.device)
    bad = ~storable & (tokens < torch.tensor(counts, device=keys.device).view(-1, 1, 1))
    if bad.any():
        row, head, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"keys or values hold NaN, Inf or a number too large for {config.metadata} metadata, "
            f"first in sequence {row}, KV head {head}, new token {token} "
            "(check_finite=False stores NaN and Inf tokens as zeros)"
        )


def zero_nonfinite(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with every token that holds NaN or Inf replaced by zeros, per KV head."""
    finite = keys.isfinite().all(-1, keepdim=True) & values.isfinite().all(-1, keepdim=True)
    return torch.where(finite, keys, 0), torch.where(finite, values, 0)


def check_restorable(
    sequences: list[dict[str, Any]],
    pages: Tensor,
    layout: PageLayout,
    sink_slots: int,
    tail_slots: int,
) -> None:
    """Raises ValueError unless sequences and pages from a file fit the cache that reads them."""
    shape = (pages.shape[0], layout.num_kv_heads, layout.page_bytes)
    if pages.dtype != torch.uint8 or tuple(pages.shape) != shape:
        raise ValueError(f"pages are {tuple(pages.shape)}: expected {shape} bytes")
    for s in sequences:
        if (
            not 0 <= s["sinks"] <= sink_slots
            or not 0 <= s["tail"] <= tail_slots
            or any(not 0 <= page < pages.shape[0] for page in s["pages"])
        ):
            raise ValueError(f"sequence {s}: expected numbers that fit the cache")
