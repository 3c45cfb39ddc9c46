"""Transformers: a cache that any model takes, and the ``"oscar"`` attention that reads it packed.

    cache = OscarCache(model.config)
    model.generate(**inputs, past_key_values=cache)

That works with every attention implementation: the model then sees dequantized states. Loaded
with ``attn_implementation="oscar"`` the model attends straight from the packed pages.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.config import OscarConfig
from oscar_kv.integrations import attention_function
from oscar_kv.integrations.compile import untraced
from oscar_kv.integrations.layer import OscarLayer, layer_memory
from oscar_kv.integrations.models import (
    ImageLayer,
    cache_layers,
    head_dim_of,
    identity,
    is_quantized,
    require_usable_cache,
)
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.offload import StagingByDevice
from oscar_kv.storage.packed import PackedKV


class OscarCache(Cache):
    """A KV cache in about 2.2 bits per element, for ``past_key_values=``.

    Full-attention layers are quantized; sliding-window, linear-attention and other layers keep
    the cache layers that Transformers gives them. For inference: no gradient flows through it.

    Args:
        model_config: ``model.config``.
        config: ``OscarConfig.compact()`` if omitted.
        layers: another config for some of the model's layers, by index: those that a model needs
            most precisely (``oscar-kv diagnose`` names them). With the same full-precision tokens.
        max_tokens: makes room for sequences of this length up front; memory grows as needed if
            omitted.
        offloading: keep pages in CPU memory; those of a layer come to its device while the layer
            before it computes. What is not quantized stays on the device.

    Raises:
        ValueError: if the model has no full-attention layer, a head size without a layout, an
            encoder (:class:`OscarEncoderDecoderCache` is for those), or does not use a cache.
        TypeError: if an argument has the wrong type.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: OscarConfig | None = None,
        *,
        layers: Mapping[int, OscarConfig] | None = None,
        max_tokens: int | None = None,
        offloading: bool = False,
    ) -> None:
        if not isinstance(model_config, PreTrainedConfig):
            raise TypeError(
                f"model_config is a {type(model_config).__name__}: expected model.config"
            )
        config = OscarConfig() if config is None else config
        others = dict(layers or {})
        for one in (config, *others.values()):
            if not isinstance(one, OscarConfig):
                raise TypeError(f"config is a {type(one).__name__}: expected an OscarConfig")
            for name in ("sink_tokens", "recent_tokens"):
                if (own := getattr(one, name)) != (usual := getattr(config, name)):
                    raise ValueError(f"layers: {name}={own}, expected {usual} as in other layers")
        if getattr(model_config, "dtype", None) == torch.float64:
            raise TypeError("the model is float64: expected float16, bfloat16 or float32")
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise ValueError(f"max_tokens={max_tokens!r}: expected a positive integer")
        require_usable_cache(model_config)
        self.made_for = identity(model_config)
        """Fields of the model's config by which a file tells whose cache it holds."""
        self.staging = StagingByDevice() if offloading else None
        made: list[Any] = []
        for index, (layer, layer_config) in enumerate(cache_layers(model_config)):
            if not is_quantized(layer):
                made.append(layer)
                continue
            own = others.pop(index, config)
            if head_dim := head_dim_of(layer_config):
                PageLayout(own, head_dim, 1)  # raises for a size without a layout
            made.append(OscarLayer(own, max_tokens, self.staging))
        if others:
            raise ValueError(f"layers={sorted(others)}: no full-attention layers of this model")
        super().__init__(layers=made)  # whose offloading moves whole layers, both ways each time
        self.offloading = offloading
        self._torn = False
        self._latest: tuple[int, int] | None = None
        """The layer that was updated last, and the thread that did it."""

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new states of one layer; see :meth:`OscarLayer.update`.

        A forward pass that fails in between has stored its states in some layers and not in others:
        these are rolled back, at once if a layer refuses its states, else when the next pass
        begins. The pass can be repeated. One that fails after its last layer has stored its states
        looks complete: ``crop`` takes it back.

        Raises:
            ValueError: for states that are refused, and, in a model with layers that cannot be
                rolled back, for every update from then on until :meth:`reset`.
            RuntimeError: if another thread is in the middle of a forward pass.
        """
        if self._latest is not None and layer_idx <= self._latest[0]:
            self._begin_pass()
        self._latest = layer_idx, threading.get_ident()
        if self._torn:
            raise ValueError("an earlier forward pass failed half-way: call reset() first")
        layer: Any = self.layers[layer_idx]
        try:
            if self.offloading and isinstance(layer, OscarLayer):
                self._prefetch(layer)
            return layer.update(key_states, value_states, *args, **kwargs)
        except Exception:
            self._roll_back(layer.get_seq_length(), self.layers[:layer_idx])
            raise

    def _prefetch(self, layer: OscarLayer) -> None:
        """Has the pages of ``layer`` and of the quantized layer after it on their way."""
        layers = self._quantized()
        layer.prefetch()
        layers[(layers.index(layer) + 1) % len(layers)].prefetch()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the forward passes that came to their end."""
        unfinished = self._before_unfinished_pass()
        if unfinished is None or isinstance(self.layers[layer_idx], ImageLayer):
            return super().get_seq_length(layer_idx)
        return unfinished

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of a mask for so many queries, and the position of the first one."""
        unfinished = self._before_unfinished_pass()
        if unfinished is None or not isinstance(self.layers[layer_idx], OscarLayer):
            return super().get_mask_sizes(query_length, layer_idx)
        return unfinished + query_length, 0

    def _before_unfinished_pass(self) -> int | None:
        """How long quantized layers were before a pass that has not reached all of them."""
        layers = self._quantized()
        if layers[0].get_seq_length() == layers[-1].get_seq_length():
            return None
        lengths = [layer.get_seq_length() for layer in layers]
        # The first layers are longer than the others, which are equally long.
        one_step = len(set(lengths)) == 2 and lengths == sorted(lengths, reverse=True)
        return lengths[-1] if one_step else None

    def _begin_pass(self) -> None:
        """Takes back what a pass that never came to its end has stored."""
        length = self._before_unfinished_pass()
        if length is None or self._latest is None:
            return
        if self._latest[1] != threading.get_ident():
            raise RuntimeError(
                "another thread is in the middle of a forward pass over this cache: give every "
                "thread a cache of its own"
            )
        self._roll_back(length, self.layers)

    def _roll_back(self, length: int, layers: list[Any]) -> None:
        """Brings ``layers`` back to ``length``."""
        for layer in layers:
            if isinstance(layer, OscarLayer):
                layer.crop(min(0, length - layer.get_seq_length()))
            elif any(layer_memory(layer).values()):
                self._torn = True

    def reset(self) -> None:
        super().reset()
        self._torn, self._latest = False, None
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                # Transformers 5.17 zeroes these states, and the next update would grow them.
                layer.keys, layer.values, layer.is_initialized = None, None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        # one transfer here, not one per layer
        super().reorder_cache(cast(torch.LongTensor, beam_idx.cpu()))

    def reserve(self, tokens: int) -> None:
        """Sets memory aside for ``tokens`` more tokens; see :meth:`PackedKV.reserve`.

        Raises:
            ValueError: before the prompt, for a model with layers that are not quantized, or with
                offloading.
        """
        for packed in self.packed_layers():
            packed.reserve(tokens)

    def advance(self, tokens: int) -> None:
        """Counts tokens that were appended on the device alone; see :meth:`PackedKV.advance`."""
        for packed in self.packed_layers():
            packed.advance(tokens)

    def _quantized(self) -> list[OscarLayer]:
        return [layer for layer in self.layers if isinstance(layer, OscarLayer)]

    def packed_layers(self) -> list[PackedKV]:
        """What every layer holds, first layer first.

        Raises:
            ValueError: before the prompt, or for a model with layers that are not quantized.
        """
        layers = self._quantized()
        if len(layers) < len(self.layers):
            others = sorted({type(x).__name__ for x in self.layers if x not in layers})
            raise ValueError(f"only for models whose layers are all quantized, not {others}")
        packed = [layer.packed for layer in layers if layer.packed is not None]
        if len(packed) < len(layers):
            raise ValueError("the cache is empty: run the prompt first")
        return packed

    @property
    def stored_as_zeros(self) -> Tensor:
        """int32 scalar on the device: how often NaN or Inf was stored as zeros by a kernel."""
        return torch.cat([packed.nonfinite for packed in self.packed_layers()]).sum()

    def memory(self) -> dict[str, int]:
        """Bytes allocated by kind, summed over layers.

        The kinds of :meth:`PackedKV.memory`, ``other`` for the states of layers that are not
        quantized and, with offloading, ``staging`` for pages on their way through a device.
        """
        kinds: dict[str, int] = {}
        if self.staging is not None:
            kinds["staging"] = sum(staging.nbytes for staging in self.staging.values())
        for layer in self.layers:
            for kind, count in layer_memory(layer).items():
                kinds[kind] = kinds.get(kind, 0) + count
        return kinds

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the sum of :meth:`memory`."""
        return sum(self.memory().values())

    @property
    def host_nbytes(self) -> int:
        """How many of these are in CPU memory because of ``offloading``."""
        held = [layer.packed for layer in self._quantized() if layer.packed is not None]
        return sum(packed.pool.host_nbytes for packed in held)


attention_function.register()
