"""Queries, keys and values of every layer, as its attention receives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from oscar_kv.core.attention import attention
from oscar_kv.evaluation.methods import LayerStates
from oscar_kv.integrations.attention_function import oscar_attention_forward, oscar_mask
from oscar_kv.integrations.models import cache_layers, is_quantized

_NAME = "oscar_capture"


@dataclass(frozen=True)
class CapturedAttention:
    """One layer's attention as it was called: its states, and how it attends over them."""

    states: LayerStates
    mask: Tensor | None
    """As :func:`oscar_kv.core.attention.attention` takes it; ``None`` for plain causality."""
    scaling: float | None
    softcap: float | None
    s_aux: Tensor | None

    def attend(self, keys: Tensor, values: Tensor, queries: int) -> Tensor:
        """Output of the last ``queries`` positions over other keys and values, float32
        ``[B, Hq, queries, E]``."""
        return attention(
            self.states.queries[:, :, -queries:].float(),
            keys.float(),
            values.float(),
            mask=None if self.mask is None else self.mask[..., -queries:, :],
            scaling=self.scaling,
            softcap=self.softcap,
            s_aux=self.s_aux,
        )


def capture(model: Any, tokens: Tensor) -> dict[int, LayerStates]:
    """The states of :func:`capture_attention` over ``tokens``, int ``[B, T]``."""
    found = capture_attention(model, {"input_ids": tokens})
    return {index: layer.states for index, layer in found.items()}


@torch.no_grad()
def capture_attention(model: Any, inputs: Mapping[str, Any]) -> dict[int, CapturedAttention]:
    """One forward pass over ``inputs``, in full precision.

    Args:
        model: any causal model whose attention can be exchanged.
        inputs: arguments of its forward pass, images and sounds included.

    Returns:
        The attention of every full-attention layer by its index, first layer first.

    Raises:
        ValueError: if they cannot be had from this model.
    """
    found: dict[int, CapturedAttention] = {}
    placed = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    # A model and the parts that read images may attend in different ways: outer ones come first.
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation(_NAME)
    try:
        model(**placed, use_cache=False, captured_states=found, logits_to_keep=1)
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name
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
    captured_states: dict[int, CapturedAttention] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    # What reads an image runs before the language model, and mostly without such an index.
    index: Any = getattr(module, "layer_idx", None)
    if captured_states is not None and index is not None:
        how = (kwargs.get(name) for name in ("scaling", "softcap", "s_aux"))
        states = LayerStates(query, key, value)
        captured_states[int(index)] = CapturedAttention(states, attention_mask, *how)
    return oscar_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _capturing_attention)
AttentionMaskInterface.register(_NAME, oscar_mask)
