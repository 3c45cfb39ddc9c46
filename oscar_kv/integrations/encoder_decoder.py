"""The cache of encoder-decoder models: T5, BART, Whisper and the like."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.config import OscarConfig
from oscar_kv.integrations.layer import drop_graph, layer_memory
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.storage.ownership import outside_inference_mode


class _EncoderStates(DynamicCache):
    """What a decoder reads of the encoder, whatever mode it was computed in."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        with outside_inference_mode():
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        drop_graph(self.layers[layer_idx])
        return states


class OscarEncoderDecoderCache(EncoderDecoderCache):
    """A cache for ``past_key_values=`` of an encoder-decoder model.

    What the decoder has written is quantized, as by :class:`OscarCache`. What it reads of the
    encoder stays in full precision: models take it straight out of Transformers' cache layers.

    Args:
        model_config: ``model.config``.
        config: ``OscarConfig.compact()`` if omitted.
        layers: another config for some of the decoder's layers, as in :class:`OscarCache`.
        max_tokens: makes room for decoded sequences of this length up front.

    Raises:
        ValueError: if the model has no encoder; else as :class:`OscarCache`.
        TypeError: if an argument has the wrong type.
    """

    self_attention_cache: OscarCache

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: OscarConfig | None = None,
        *,
        layers: Mapping[int, OscarConfig] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if not isinstance(model_config, PreTrainedConfig):
            raise TypeError(
                f"model_config is a {type(model_config).__name__}: expected model.config"
            )
        if not model_config.is_encoder_decoder:
            raise ValueError(f"{model_config.model_type} has no encoder: use OscarCache")
        decoder = copy.deepcopy(model_config.get_text_config(decoder=True))
        decoder.is_encoder_decoder = False
        super().__init__(
            OscarCache(decoder, config, layers=layers, max_tokens=max_tokens),
            _EncoderStates(config=decoder),
        )

    def memory(self) -> dict[str, int]:
        """Bytes allocated by kind: those of :meth:`OscarCache.memory` for what the decoder has
        written, and ``encoder`` for what it reads of the encoder."""
        held = [layer_memory(layer) for layer in self.cross_attention_cache.layers]
        return {
            **self.self_attention_cache.memory(),
            "encoder": sum(sum(kinds.values()) for kinds in held),
        }

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the sum of :meth:`memory`."""
        return sum(self.memory().values())

    def check_dynamic_cache(self, method: str) -> None:
        """Transformers' guard against caches that cannot be cropped or repeated: these can."""
