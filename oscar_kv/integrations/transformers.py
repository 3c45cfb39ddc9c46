"""Transformers: a cache that any model takes, and the ``"oscar"`` attention that reads it packed.

    cache = OscarCache(model.config)
    model.generate(**inputs, past_key_values=cache)

That works with every attention implementation: the model then sees dequantized states. Loaded
with ``attn_implementation="oscar"`` the model attends straight from the packed pages.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.config import OscarConfig
from oscar_kv.integrations import attention_function
from oscar_kv.integrations.compile import untraced
from oscar_kv.integrations.layer import OscarLayer, drop_graph, holds_states, layer_memory
from oscar_kv.integrations.models import (
    ImageLayer,
    cache_layers,
    head_dim_of,
    identity,
    is_quantized,
    require_usable_cache,
)
from oscar_kv.integrations.passes import Passes
from oscar_kv.integrations.versions import warn_if_untested
from oscar_kv.storage.checks import as_integers
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.offload import StagingByDevice
from oscar_kv.storage.ownership import outside_inference_mode
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
        starts: tokens of left padding of each sequence of a batch. They are then not stored, and
            ``sink_tokens`` counts from the first token behind them.
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
        starts: Tensor | Sequence[int] | None = None,
        offloading: bool = False,
    ) -> None:
        if not isinstance(model_config, PreTrainedConfig):
            raise TypeError(
                f"model_config is a {type(model_config).__name__}: expected model.config"
            )
        config = OscarConfig() if config is None else config
        if layers is not None and not isinstance(layers, Mapping):
            raise TypeError(f"layers={layers!r}: expected a dict, from layer index to OscarConfig")
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
        padding = _numbers_of_padding(starts)
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
            made.append(OscarLayer(own, max_tokens, self.staging, padding))
        if others:
            raise ValueError(f"layers={sorted(others)}: no full-attention layers of this model")
        super().__init__(layers=made)  # whose offloading moves whole layers, both ways each time
        self.offloading = offloading
        self._passes = Passes()
        self._torn = False
        """Whether a pass has changed layers that cannot be rolled back, and others not."""

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new states of one layer; see :meth:`OscarLayer.update`.

        A forward pass that fails in between has stored its states in some layers and not in others:
        these are rolled back, at once if a layer refuses its states, else when the next pass
        begins. The pass can be repeated. A failed first pass is noticed only by the next one, which
        then asks for :meth:`reset`. A pass that fails after its last layer has stored its states
        looks complete: ``crop`` takes it back.

        Raises:
            ValueError: for states that are refused, and for every update until :meth:`reset` once
                a failed pass has left states that cannot be rolled back.
            RuntimeError: if another thread is in the middle of a forward pass.
        """
        new = key_states.shape[-2] if key_states.ndim > 1 else 0
        with self._step_of_a_pass(layer_idx, "states", new) as layer:
            if self.offloading and isinstance(layer, OscarLayer):
                self._prefetch(layer)
            return layer.update(key_states, value_states, *args, **kwargs)

    @untraced
    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As in Transformers; part of a pass as :meth:`update` is."""
        with self._step_of_a_pass(layer_idx, f"convolution {_state_index(args, kwargs)}"):
            return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @untraced
    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As in Transformers; part of a pass as :meth:`update` is."""
        with self._step_of_a_pass(layer_idx, f"recurrence {_state_index(args, kwargs)}"):
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @untraced
    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As in Transformers."""
        return self._lend("convolution", super().get_conv_state, layer_idx, *args, **kwargs)

    @untraced
    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As in Transformers."""
        return self._lend("recurrence", super().get_recurrent_state, layer_idx, *args, **kwargs)

    def _lend(self, kind: str, get: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """A state, which a model may update in place: that is a step of a pass, too. With
        gradients on, the model gets a detached alias."""
        kind = f"lent {kind} {_state_index(args, kwargs)}"
        if self._passes.begins_anew(layer_idx, kind):
            self.end_pass()
        self._require_whole()
        state = get(layer_idx, *args, **kwargs)
        self._passes.lend(layer_idx, kind, state)
        return state.detach() if state is not None and torch.is_grad_enabled() else state

    @contextmanager
    def _step_of_a_pass(self, layer_idx: int, kind: str, new: int = 0) -> Iterator[Any]:
        """A layer while it is updated; if that fails, all that the pass has stored is taken back.

        Transformers' own layers keep what they are given: outside of inference mode, so that they
        can be updated outside of it, too, and without the graph that the states came from.
        """
        if layer_idx >= len(self.layers):
            raise IndexError(
                f"layer {layer_idx}: this cache was made for {len(self.layers)} layers; make one "
                "from the config of the model that runs"
            )
        layer: Any = self.layers[layer_idx]
        passes = self._passes
        if isinstance(layer, ImageLayer):  # stored once, not in every pass
            with outside_inference_mode():
                yield layer
            return
        if passes.begins_anew(layer_idx, kind):
            self.end_pass()
        if passes.layers is None:
            passes.layers = {index for index, one in enumerate(self.layers) if holds_states(one)}
        self._require_whole()
        counts = kind == "states" and isinstance(layer, CacheLayerMixin)
        before = layer.get_seq_length() if counts else None
        try:
            passes.record(layer_idx, kind, before, new)
        except ValueError:
            self._torn = True
            raise
        try:
            with outside_inference_mode():
                yield layer
        except BaseException:  # Ctrl-C, too
            self._take_back()
            raise
        if not isinstance(layer, OscarLayer):
            drop_graph(layer)

    def _prefetch(self, layer: OscarLayer) -> None:
        """Has the pages of ``layer`` and of the quantized layer after it on their way."""
        layers = self._quantized()
        layer.prefetch()
        layers[(layers.index(layer) + 1) % len(layers)].prefetch()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the forward passes that came to their end."""
        length = super().get_seq_length(layer_idx)
        if self._passes.unfinished and not isinstance(self.layers[layer_idx], ImageLayer):
            before = self._passes.length_before
            return length if before is None else before
        return length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of a mask for so many queries, and the position of the first one."""
        self._require_whole()
        self._passes.mask_asked_for()
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], OscarLayer):
            return self.get_seq_length(layer_idx) + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def _require_whole(self) -> None:
        if self._torn:
            raise ValueError("an earlier forward pass failed half-way: call reset() first")

    def end_pass(self) -> None:
        """Ends the latest pass, and takes back what one that never came to its end has stored.

        Raises:
            ValueError: if that cannot be taken back: call :meth:`reset`.
            RuntimeError: if another thread is in the middle of a forward pass.
        """
        self._passes.require_not_running(self)
        if self._passes.unfinished:
            self._take_back()
        self._passes.end()
        self._require_whole()

    def _take_back(self) -> None:
        """Brings the layers that the latest pass has updated back to what they were before."""
        torn, self._torn = self._torn, True  # until all of them are
        for index in self._passes.updated:
            layer: Any = self.layers[index]
            if isinstance(layer, OscarLayer):
                layer.crop(min(0, self._passes.held_before(index) - layer.get_seq_length()))
            else:
                torn |= holds_states(layer)
        self._torn = torn
        self._passes.end(taken_back=True)

    def reset(self, starts: Tensor | Sequence[int] | None = None) -> None:
        """Forgets every token, and whatever has failed.

        Args:
            starts: left padding of the sequences to come; those known so far are forgotten, too.
        """
        super().reset()
        for layer in self._quantized():
            layer.starts = _numbers_of_padding(starts)
        self._passes, self._torn = Passes(), False
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                # Transformers 5.17 zeroes these states, and the next update would grow them.
                layer.keys, layer.values, layer.is_initialized = None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest ``-tokens_to_remove`` tokens, in all layers or, on an error, in none.

        Raises:
            ValueError: for a positive number, or more tokens than there are.
            RuntimeError: if a layer that is not quantized has let go of what it would need.
        """
        self._each_layer("crop", int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the batch by these of its sequences, as beam search does."""
        self._each_layer("reorder_cache", torch.as_tensor(beam_idx).cpu())  # one transfer for all

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence ``repeats`` times."""
        self._each_layer("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences: their numbers, or a bool for each."""
        self._each_layer("batch_select_indices", torch.as_tensor(indices).cpu())

    def _each_layer(self, method: str, argument: Any) -> None:
        """Calls a method of every layer: those of Transformers first, which may refuse. What they
        hold they replace, so that it can be put back."""
        self.end_pass()
        quantized, done = self._quantized(), 0
        others: list[Any] = [x for x in self.layers if not isinstance(x, OscarLayer)]
        before = [
            {name: copy.copy(x) if isinstance(x, dict) else x for name, x in vars(layer).items()}
            for layer in others
        ]
        try:
            for layer in (*others, *quantized):
                if not hasattr(layer, method):
                    raise ValueError(f"{method}: a {type(layer).__name__} cannot do that")
                getattr(layer, method)(argument)
                done += isinstance(layer, OscarLayer)
        except BaseException:
            self._torn = done > 0  # what one refuses all refuse, but for Ctrl-C and want of memory
            for layer, attributes in zip(others, before):
                vars(layer).update(attributes)
            raise

    def reserve(self, tokens: int) -> None:
        """Sets memory aside for ``tokens`` more tokens; see :meth:`PackedKV.reserve`.

        Raises:
            ValueError: before the prompt, for a model with layers that are not quantized, or with
                offloading.
        """
        self.end_pass()
        for packed in self.packed_layers():
            packed.reserve(tokens)

    def advance(self, tokens: int) -> None:
        """Counts tokens that were appended on the device alone; see :meth:`PackedKV.advance`."""
        self.end_pass()
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
    def max_cache_len(self) -> int:
        raise AttributeError(
            "an OscarCache grows and has no max_cache_len. PEFT's prefix tuning asks for it to put "
            "a full-precision cache of its own in the place of this one: use LoRA or prompt tuning"
        )

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


def _state_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return kwargs.get("state_idx", args[0] if args else 0)


def _numbers_of_padding(starts: Tensor | Sequence[int] | None) -> list[int]:
    numbers = [] if starts is None else as_integers("starts", list(starts))
    if any(number < 0 for number in numbers):
        raise ValueError(f"starts={numbers}: expected numbers of tokens")
    return numbers


attention_function.register()
warn_if_untested()
