"""Transformers: a cache that any model takes, and the ``"oscar"`` attention that reads it packed.

    cache = OscarCache(model.config)
    model.generate(**inputs, past_key_values=cache)

That works with every attention implementation: the model then sees dequantized states. Loaded
with ``attn_implementation="oscar"`` the model attends straight from the packed pages.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from oscar_kv.config import OscarConfig
from oscar_kv.core.attention import attention
from oscar_kv.integrations.lazy import AttentionView, LazyStates
from oscar_kv.kernels import append, extend_attention
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV


class OscarLayer(CacheLayerMixin):
    """The quantized cache of one full-attention layer."""

    is_sliding = False

    def __init__(self, config: OscarConfig) -> None:
        super().__init__()
        self.config = config
        self.packed: PackedKV | None = None

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a rollback of a few tokens leaves no trace: it then stays within the tail."""
        return self.config.recent_tokens > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        value_dim = value_states.shape[3]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.packed = PackedKV(
            self.config,
            batch_size=batch,
            num_kv_heads=heads,
            head_dim=head_dim,
            value_head_dim=None if value_dim == head_dim else value_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states ``[B, H, T, channels]`` and returns what the model attends over.

        The first call returns the states themselves: a prompt attends over its exact self.
        """
        if self.packed is None:
            self.lazy_initialization(key_states, value_states)
            assert self.packed is not None
        packed = self.packed
        before, new = packed.max_length, key_states.shape[2]
        append(packed, key_states, value_states)
        if before == 0:
            return key_states, value_states
        in_tail = new <= min(packed.tails_per_sequence)
        view = AttentionView(packed, *((None, None) if in_tail else (key_states, value_states)))
        return LazyStates.pair(view)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.packed is None else self.packed.max_length

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        if self.packed is not None:
            self.packed.to("cpu")

    def prefetch(self) -> None:
        if self.packed is not None:
            self.packed.to(self.device)

    def reset(self) -> None:
        self.packed, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest ``-tokens_to_remove`` tokens; see :meth:`PackedKV.crop`.

        Raises:
            ValueError: for a positive number, or more tokens than there are.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): expected a negative number of tokens to remove"
            )
        if self.packed is not None and tokens_to_remove:
            self.packed.crop([length + tokens_to_remove for length in self.packed.lengths])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.packed is not None:
            self.packed.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.packed is not None:
            rows = range(self.packed.batch_size)
            self.packed.select([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.packed is not None:
            rows = torch.arange(self.packed.batch_size)
            self.packed.select(rows[indices.cpu()].tolist())


class OscarCache(Cache):
    """A KV cache in about 2.2 bits per element, for ``past_key_values=``.

    Full-attention layers are quantized; sliding-window, linear-attention and other layers keep
    the cache layers that Transformers gives them.

    Args:
        model_config: ``model.config``.
        config: ``OscarConfig.compact()`` if omitted.
        offloading: keep layers in CPU memory while other layers compute.

    Raises:
        ValueError: if the model has no full-attention layer, or a head size without a layout.
        TypeError: if an argument has the wrong type.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: OscarConfig | None = None,
        *,
        offloading: bool = False,
    ) -> None:
        if not isinstance(model_config, PreTrainedConfig):
            raise TypeError(
                f"model_config is a {type(model_config).__name__}: expected model.config"
            )
        self.config = OscarConfig() if config is None else config
        if not isinstance(self.config, OscarConfig):
            raise TypeError(f"config is a {type(config).__name__}: expected an OscarConfig")
        layers: list[Any] = list(DynamicCache(config=model_config).layers)
        quantized = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not quantized:
            kinds = sorted({type(layer).__name__ for layer in layers})
            raise ValueError(
                f"{model_config.model_type} has no full-attention layer to quantize, only {kinds}"
            )
        _check_head_dim(model_config, self.config)
        for index in quantized:
            layers[index] = OscarLayer(self.config)
        super().__init__(layers=layers, offloading=offloading)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(
            cast(torch.LongTensor, beam_idx.cpu())
        )  # one transfer, not one per layer

    def memory(self) -> dict[str, int]:
        """Bytes allocated by kind, summed over layers.

        The kinds of :meth:`PackedKV.memory`, and ``other`` for the states of layers that are
        not quantized.
        """
        kinds: dict[str, int] = {}
        for layer in self.layers:
            for kind, count in _layer_memory(layer).items():
                kinds[kind] = kinds.get(kind, 0) + count
        return kinds

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the sum of :meth:`memory`."""
        return sum(self.memory().values())


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
        ValueError: for dropout or a position bias over packed states.
    """
    if isinstance(key, LazyStates):
        if dropout:
            raise ValueError(f"dropout={dropout}: expected 0 over a quantized cache")
        if kwargs.get("position_bias") is not None:
            raise ValueError("position_bias: not supported over a quantized cache")
        view = key.view_of
        out = extend_attention(
            query,
            view.packed,
            view.new_keys,
            view.new_values,
            scaling=scaling,
            softcap=softcap,
            s_aux=s_aux,
            mask=attention_mask,
        )
        return out.transpose(1, 2).contiguous(), None
    if softcap is None and s_aux is None:
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            attention_mask = _causal(query, key)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
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
    """The mask of ``"oscar"``: ``None`` for plain causality over the whole cache, else boolean."""
    if (
        allow_is_causal_skip
        and mask_function is causal_mask_function
        and isinstance(q_offset, int)
        and kv_offset == 0
        and kv_length == q_offset + q_length
        and (attention_mask is None or bool(attention_mask.all()))
    ):
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Bool ``[1, 1, Tq, T]``: the newest Tq of T tokens see everything up to themselves."""
    queries, total = query.shape[2], key.shape[2]
    ones = torch.ones(queries, total, dtype=torch.bool, device=query.device)
    return ones.tril(total - queries)[None, None]


def _check_head_dim(model_config: PreTrainedConfig, config: OscarConfig) -> None:
    """Raises early where the head size is known from the config and has no layout."""
    text = model_config.get_text_config(decoder=True)
    if isinstance(head_dim := getattr(text, "head_dim", None), int):
        PageLayout(config, head_dim, 1)


def _layer_memory(layer: Any) -> dict[str, int]:
    if isinstance(layer, OscarLayer):
        return {} if layer.packed is None else layer.packed.memory()
    tensors = [t for t in vars(layer).values() if isinstance(t, Tensor)]
    for group in ("conv_states", "recurrent_states"):
        tensors += [t for t in getattr(layer, group, {}).values() if isinstance(t, Tensor)]
    return {"other": sum(t.numel() * t.itemsize for t in tensors)}


AttentionInterface.register("oscar", oscar_attention_forward)
AttentionMaskInterface.register("oscar", oscar_mask)
