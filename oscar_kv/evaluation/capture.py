"""Queries, keys and values of every layer, as its attention receives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from oscar_kv.evaluation.methods import LayerStates
from oscar_kv.integrations.attention_function import oscar_attention_forward, oscar_mask
from oscar_kv.integrations.models import cache_layers, is_quantized

_NAME = "oscar_capture"


@torch.no_grad()
def capture(model: Any, tokens: Tensor) -> dict[int, LayerStates]:
    """One forward pass over ``tokens``, in full precision.

    Args:
        model: any causal model whose attention can be exchanged.
        tokens: int ``[B, T]``.

    Returns:
        The states of every full-attention layer by its index, first layer first.

    Raises:
        ValueError: if they cannot be had from this model.
    """
    found: dict[int, LayerStates] = {}
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        model(tokens.to(model.device), use_cache=False, captured_states=found, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    layers = enumerate(layer for layer, _ in cache_layers(model.config))
    wanted = [index for index, layer in layers if is_quantized(layer)]
    if missing := [index for index in wanted if index not in found]:
        raise ValueError(
            f"{model.config.model_type}: the states of layers {missing} cannot be captured, its "
            "attention cannot be exchanged or takes no keyword arguments"
        )
    return {index: found[index] for index in wanted}


def _capturing_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    captured_states: dict[int, LayerStates] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if captured_states is not None:
        captured_states[int(module.layer_idx)] = LayerStates(query, key, value)  # pyright: ignore
    return oscar_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _capturing_attention)
AttentionMaskInterface.register(_NAME, oscar_mask)
