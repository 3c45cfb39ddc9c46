"""Omni-Token Scaling: each token's norm is factored out of its key (paper, section 4).

Tokens of very different norm in one quantization group (Token Norm Imbalance) are what breaks
per-channel INT2. ``k = s u``: ``u`` is quantized, ``s`` is multiplied back on the logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oscar_kv.core.grid import round_fp16

REFIT_LIMITS = (0.5, 2.0)
"""Smallest and largest ratio by which :func:`unbiased_token_scale` may change a token scale."""


def token_scale(keys: Tensor, mode: str, exponent: float, unit_pages: bool) -> Tensor:
    """The scale ``s`` that is divided out of every key before its group is fitted.

    Args:
        keys: rotated keys of whole pages, float32 ``[pages, H, tokens, D]``.
        mode: ``"per_head"``, ``"cross_head"`` (one norm over all H heads) or ``"none"``.
        exponent: ``s = norm ** exponent``.
        unit_pages: also bring each page, or each head of it, to a root mean square of one: the
            entries of ``u`` are then at most ``sqrt(tokens * D)``, which narrow metadata can hold
            for every head_dim up to 1568.

    Returns:
        float32 ``[pages, H, tokens, 1]``, rounded to float16 and never zero.
    """
    norm = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    if mode == "cross_head":
        norm = torch.linalg.vector_norm(norm, dim=1, keepdim=True).expand_as(norm)
    scale = torch.ones_like(norm) if mode == "none" else norm.pow(exponent)
    scale = torch.where(norm > 0, scale, 1.0)
    if unit_pages:
        shared = (1, 2, 3) if mode == "cross_head" else (2, 3)
        rms = (keys / scale).square().mean(shared, keepdim=True).sqrt()
        scale = scale * torch.where(rms > 0, rms, 1.0)
    return _never_zero(scale)


def unbiased_token_scale(scale: Tensor, exact: Tensor, read: Tensor, mode: str) -> Tensor:
    """Corrects ``s`` so that ``<k, k_hat> = <k, k>`` for every key that has its own scale.

    Args:
        scale: ``[pages, H, tokens, 1]`` from :func:`token_scale`.
        exact: ``u = k / s``, float32 ``[pages, H, tokens, D]``.
        read: ``u`` as its codes reconstruct it, same shape.
        mode: as in :func:`token_scale`; ``"none"`` has no scale to correct.

    Returns:
        The corrected scale, rounded to float16.
    """
    if mode == "none":
        return scale
    wanted = exact.square().sum(-1, keepdim=True)
    found = (exact * read).sum(-1, keepdim=True)
    if mode == "cross_head":
        wanted, found = (t.sum(1, keepdim=True).expand_as(t) for t in (wanted, found))
    ratio = torch.where(found > 0, wanted / found.clamp_min(1e-30), 1.0).clamp(*REFIT_LIMITS)
    return _never_zero(scale * ratio)


def _never_zero(scale: Tensor) -> Tensor:
    return round_fp16(scale.clamp_min(2.0**-24))
