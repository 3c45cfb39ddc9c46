"""The ``"oscar"`` attention and mask functions of Transformers' registries.

The attention function receives tensors only. Where these are :class:`LazyStates` it attends over
the packed pages behind them; everything else goes where ``"sdpa"`` would go.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from oscar_kv.core.attention import attention
from oscar_kv.integrations.compile import untraced
from oscar_kv.integrations.lazy import (
    AttentionView,
    LazyStates,
    learning,
    refuse_gradients,
)
from oscar_kv.kernels import extend_attention

_NEED_ADDITIVE_MASK = ("bigbird_pegasus", "git", "nllb-moe", "pegasus_x")
"""Model types written for eager attention only, which accept ``"oscar"`` nevertheless: they add the
mask to scores themselves in some layers, or do not say that a layer without a mask is causal."""


def register() -> None:
    """Makes ``attn_implementation="oscar"`` known to Transformers."""
    AttentionInterface.register("oscar", oscar_attention_forward)
    AttentionMaskInterface.register("oscar", oscar_mask)


@untraced
def oscar_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The ``"oscar"`` attention function of ``AttentionInterface``.

    Packed states are attended packed. Plain ones (prompts, layers that are not quantized, other
    caches) go to scaled-dot-product attention, or to the dense oracle where soft-capped logits
    or attention sinks rule it out.

    Args:
        query: ``[B, Hq, Tq, D]``.
        key, value: :class:`LazyStates`, or plain ``[B, H, T, channels]``.
        attention_mask: bool or additive ``[B, 1 or Hq, Tq, T]``, or ``None`` for plain causality.

    Returns:
        ``[B, Tq, Hq, E]``, and ``None`` for the weights, which are never formed.

    Raises:
        ValueError: for what could not be honoured: a sparse selection of keys, or dropout other
            than in scaled-dot-product attention.
    """
    for name in ("indices", "block_indices", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f'{name}: not supported by attn_implementation="oscar"')
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    view = _packed_view(query, key, value)
    if view is None and softcap is None and s_aux is None:
        if attention_mask is None and is_causal and 1 < query.shape[2] < key.shape[2]:
            attention_mask = _visible(query, key, causal=True)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: expected 0 here")
    if attention_mask is None and not is_causal and query.shape[2] > 1:
        attention_mask = _visible(query, key, causal=False)
    if (bias := kwargs.get("position_bias")) is not None:
        attention_mask = _biased(bias, attention_mask, query, key)
    if view is not None:
        if attention_mask is not None:
            if view.sinks:
                _warn_of_padding(attention_mask, view.sinks)
            attention_mask = view.mask_of_held(attention_mask)
        with torch.no_grad():
            out = extend_attention(
                query,
                view.packed,
                view.new_keys,
                view.new_values,
                scaling=scaling,
                starts=view.starts,
                softcap=softcap,
                s_aux=s_aux,
                mask=attention_mask,
            )
        out = refuse_gradients(out, learning(query, *view.sources))
    else:
        wide = (states.float() for states in (query, key, value))
        out = attention(*wide, scaling=scaling, softcap=softcap, s_aux=s_aux, mask=attention_mask)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def oscar_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of ``"oscar"``: ``None`` for plain causality over the whole cache, else boolean.

    Models of ``_NEED_ADDITIVE_MASK`` always get an additive one.
    """
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    if getattr(kwargs.get("config"), "model_type", None) in _NEED_ADDITIVE_MASK:
        return eager_mask(*sizes, mask_function, attention_mask, **kwargs)
    # A preallocated cache returns more keys than there are tokens (and a tensor as q_offset).
    no_spare_keys = isinstance(q_offset, int) and kv_offset + kv_length == q_offset + q_length
    if (
        allow_is_causal_skip
        and mask_function is causal_mask_function
        and no_spare_keys
        and kv_offset == 0
        and (attention_mask is None or bool(attention_mask.all()))
    ):
        return None
    return sdpa_mask(
        *sizes,
        mask_function,
        attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and no_spare_keys,
        **kwargs,
    )


def _warn_of_padding(mask: Tensor, sinks: int) -> None:
    first = mask[:, :, -1, 0]
    hidden = ~first if mask.dtype == torch.bool else first < torch.finfo(mask.dtype).min / 2
    if hidden.any():
        warnings.warn(
            f"sink_tokens={sinks} keeps left padding in full precision instead of the first tokens "
            "behind it: give its length, OscarCache(..., starts=(attention_mask == 0).sum(-1))",
            stacklevel=2,
        )


def _packed_view(query: Tensor, key: Tensor, value: Tensor) -> AttentionView | None:
    """What ``key`` and ``value`` stand for, where that can be attended packed.

    Not where a model has changed one of them since, nor where it asks for fewer tokens than it
    has just appended (Gemma 4, in layers that share keys) and some of these are quantized.
    """
    if not isinstance(key, LazyStates) or not isinstance(value, LazyStates):
        return None
    view = key.view_of
    view.require_current()
    fits = view.new_keys is None or view.new_keys.shape[2] == query.shape[2]
    return view if fits and view is value.view_of else None


def _biased(bias: Tensor, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """One additive mask of a position bias ``[B, Hq, Tq, T]`` and a mask, causal where ``None``."""
    if mask is None:
        mask = _visible(query, key, causal=True)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _visible(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Bool ``[1, 1, Tq, T]``: what the newest Tq of T tokens see, causally or everything."""
    queries, total = query.shape[2], key.shape[2]
    ones = torch.ones(queries, total, dtype=torch.bool, device=query.device)
    return (ones.tril(total - queries) if causal else ones)[None, None]
