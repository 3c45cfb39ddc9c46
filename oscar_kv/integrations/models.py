"""What a model's config says of its cache: which layers there are, which can be quantized."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig


def cache_layers(model_config: PreTrainedConfig) -> list[tuple[Any, Any]]:
    """Transformers' own cache layer of each decoder layer, empty, and that layer's config.

    Raises:
        ValueError: for a layer type that is not known, or a model with nothing to quantize.
    """
    try:
        layers = DynamicCache(config=model_config).layers
    except KeyError as error:
        raise ValueError(f"{model_config.model_type}: unknown layer type {error}") from error
    text = model_config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    layers = [DynamicLayer() if _sees_all(layer, longest) else layer for layer in layers]
    if not any(is_quantized(layer) for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"{model_config.model_type} has no full-attention layer to quantize, only {kinds}"
        )
    image_layers = getattr(text, "cross_attention_layers", None) or ()
    layers = [ImageLayer() if i in image_layers else layer for i, layer in enumerate(layers)]
    configs = getattr(text, "per_layer_config", None) or [text] * len(layers)
    return list(zip(layers, configs))


def _sees_all(layer: Any, longest: int | None) -> bool:
    """Whether a sliding window holds the ``longest`` text: Phi-3 and Phi-4-mini have such ones."""
    return (
        type(layer) is DynamicSlidingWindowLayer
        and longest is not None
        and layer.sliding_window >= longest
    )


def cache_argument(model: Any) -> str:
    """What ``model`` and its ``generate`` call the cache among their arguments.

    ``cache`` from Transformers 5.24 on, which deprecates ``past_key_values``.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class ImageLayer(DynamicLayer):
    """What one layer of a text model reads of an image: stored once, and taken out as it is."""

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back text, of which there is none here."""


# Generate text without keys and values of earlier tokens, or keep them their own way. Some would
# ignore the cache that they are given, and their configs do not tell.
_WITHOUT_KV_CACHE = ("minimax", "openai-gpt", "reformer", "rwkv", "xlm", "xlnet", "xlstm")


# Have two sets of RoPE frequencies, by the length of the text. Once it outgrows the first, their
# `prepare_inputs_for_generation` drops the cache and reads everything again. The last two are
# names of code on the hub.
_TWO_ROPES = ("phi3", "phi4_multimodal", "phimoe", "phi3_v", "phi4mm")


class DroppedCacheWarning(UserWarning):
    """``generate`` drops the cache that it is given when a text grows long."""


def reread_beyond(model_config: PreTrainedConfig) -> int | None:
    """The length beyond which a text that the model has read has to be read again, from its first
    token, as its keys are made for shorter texts; ``None`` for most models."""
    limit = getattr(model_config, "original_max_position_embeddings", None)
    longest = getattr(model_config, "max_position_embeddings", None)
    if model_config.model_type not in _TWO_ROPES or limit is None or longest is None:
        return None
    return limit if limit < longest else None


def require_usable_cache(model_config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that would ignore its cache, or misread it.

    Warns of one that drops it later.
    """
    name = model_config.model_type
    if model_config.is_encoder_decoder:
        # Given a plain cache, most decoders would store the encoder's states as their own.
        raise ValueError(f"{name} has an encoder: use OscarEncoderDecoderCache(model.config)")
    if name in _WITHOUT_KV_CACHE:
        raise ValueError(f"{name} does not keep its keys and values in a cache of Transformers")
    if getattr(model_config, "use_cache", True) is False:
        # generate() may then feed, and the cache store, the whole sequence in every step.
        raise ValueError(
            "model.config.use_cache is False: expected True, here and in model.generation_config"
        )
    if limit := reread_beyond(model_config):
        warnings.warn(
            f"generate() of {name} drops a cache of up to {limit} tokens once the text is longer, "
            "and goes on with one in full precision. Read a long prompt into the cache before: "
            "model(input_ids[:, :-1], past_key_values=cache) under torch.no_grad()",
            DroppedCacheWarning,
            stacklevel=3,
        )


def identity(model_config: PreTrainedConfig) -> dict[str, str | int]:
    """What tells one model's cache from another's, as far as the config states it: fields of the
    text model, and of its first quantized layer."""
    text = model_config.get_text_config(decoder=True)
    layer = next(config for layer, config in cache_layers(model_config) if is_quantized(layer))
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    stated = {
        "model_type": text.model_type,
        "num_hidden_layers": getattr(text, "num_hidden_layers", None),
        **{name: getattr(layer, name, None) for name in names},
    }
    return {name: value for name, value in stated.items() if isinstance(value, (str, int))}


def is_quantized(layer: Any) -> bool:
    """Whether :class:`OscarCache` takes the place of this layer of Transformers."""
    return type(layer) is DynamicLayer


def head_dim_of(config: Any) -> int | None:
    """The key channels of one head of a layer, ``None`` where the config does not tell."""
    if getattr(config, "kv_lora_rank", None) is not None:
        return None  # latent attention: what is cached is not what the config calls a head
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if head_dim is None and isinstance(width, int) and isinstance(heads, int):
        head_dim = width // heads
    return head_dim if isinstance(head_dim, int) else None
