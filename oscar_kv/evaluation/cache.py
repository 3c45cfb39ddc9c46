"""A Transformers cache whose layers give attention what a method would have stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.config import FULL_PRECISION, PAGE_TOKENS
from oscar_kv.evaluation.methods import (
    METHODS,
    LayerStates,
    Method,
    Oscar,
    bits_per_element,
    method,
    origin,
)
from oscar_kv.evaluation.methods.base import FULL_PRECISION_BITS
from oscar_kv.evaluation.mixed import MIXED, Mixed
from oscar_kv.evaluation.names import parse_name
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.models import cache_layers, is_quantized
from oscar_kv.integrations.transformers import OscarCache

CONTENDERS = (FULL_PRECISION, *METHODS, MIXED)
"""What can be compared, by name; beside these ``module:Class`` of others."""
REAL_CACHE = "@cache"
"""After the name of a preset: the cache that users have, instead of the method behind it."""


class MethodLayer(DynamicLayer):
    """Exact states, replaced by what ``method`` reads in their place once it quantizes them.

    A chunk of several tokens stands for as many single steps. Its queries see what is quantized
    when the middle one of them arrives: with chunks that end where blocks do, that is what each of
    them sees in token-by-token decoding. A method that keeps nothing in full precision has
    quantized every token by the time it is read.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.quantized = 0
        """Tokens after the sinks that are quantized."""
        self.length = 0
        """Tokens that had arrived when attention last looked."""
        self.bits = 0
        """Stored for the quantized tokens, over the whole batch."""
        self.keys: Any
        self.values: Any

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds ``[B, H, T, channels]``; a prompt gets its exact self back, as with OscarCache."""
        begin, new = self.get_seq_length(), key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        if not begin:
            # what comes next overwrites states in place, and these are the caller's
            self.keys, self.values = keys.clone(), values.clone()
            return keys, values
        self.look(begin + new if self.method.immediate else begin + (new + 1) // 2)
        return self.keys, self.values

    def look(self, length: int) -> None:
        """Quantizes what the method has quantized once ``length`` tokens are there."""
        count, sinks = self.method.quantized_tokens(length), self.method.sink_tokens
        if count > self.quantized:
            part = slice(sinks + self.quantized, sinks + count)
            exact = (states[:, :, part].float() for states in (self.keys, self.values))
            read = self.method.quantize(*exact, start=self.quantized)
            self.keys[:, :, part], self.values[:, :, part] = read.keys, read.values
            self.quantized, self.bits = count, self.bits + read.bits
        self.length = length

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a MethodCache cannot be cropped: start a new one")


class MethodCache(Cache):
    """A cache whose full-attention layers show what a method stores; other layers stay exact.

    Args:
        model_config: ``model.config``.
        methods: one for each full-attention layer, ``None`` to leave it exact; one for all of them
            if there is only one.
    """

    def __init__(self, model_config: PreTrainedConfig, methods: Sequence[Method | None]) -> None:
        layers = [layer for layer, _ in cache_layers(model_config)]
        full = full_layers(model_config)
        if len(methods) == 1:
            methods = [methods[0]] * len(full)
        for index, one in zip(full, methods, strict=True):
            if one is not None:
                layers[index] = MethodLayer(one)
        super().__init__(layers=layers)


def full_layers(model_config: PreTrainedConfig) -> list[int]:
    """Which decoder layers attend over everything, and are quantized."""
    layers = enumerate(layer for layer, _ in cache_layers(model_config))
    return [index for index, layer in layers if is_quantized(layer)]


def resolve(what: str | Method) -> str | Method | Mixed:
    """What a contender is: :data:`FULL_PRECISION`, a method, or two in one cache.

    Args:
        what: :data:`FULL_PRECISION`, what :func:`oscar_kv.evaluation.methods.method` or
            :class:`~oscar_kv.evaluation.mixed.Mixed` takes, or the former for a preset with
            :data:`REAL_CACHE` behind it: the cache that users have. Or a method itself.

    Raises:
        ValueError: for another name.
    """
    if isinstance(what, Method) or what == FULL_PRECISION:
        return what
    name = what.removesuffix(REAL_CACHE)
    base, _ = parse_name(name)
    if base not in CONTENDERS and ":" not in base:
        known = ", ".join(CONTENDERS)
        raise ValueError(f"method {base!r}: expected one of {known}, or module:Class of your own")
    if base == FULL_PRECISION:
        raise ValueError(f"method {what!r}: {FULL_PRECISION} takes no parameters")
    found = Mixed.called(name) or method(name)
    if name != what and not isinstance(found, Oscar):
        raise ValueError(f"{what!r}: only the presets have a cache of their own")
    return found


def name_of(what: str | Method) -> str:
    """A contender's name; that of a method is its class and what differs from the defaults."""
    if isinstance(what, str):
        return what
    fields = [field for field in dataclasses.fields(what) if field.init]
    changes = [
        f"{field.name}={getattr(what, field.name)}"
        for field in fields
        if getattr(what, field.name) != field.default
    ]
    return ":".join([type(what).__name__, *([",".join(changes)] if changes else [])])


def describe(what: str | Method) -> dict[str, Any]:
    """What a contender is (see :func:`resolve`), as plain values.

    Raises:
        ValueError: for an unknown name.
    """
    found = resolve(what)
    if isinstance(found, str):
        return {"class": "DynamicCache"}
    if isinstance(found, Oscar) and isinstance(what, str) and what.endswith(REAL_CACHE):
        return {"class": "OscarCache", **found.config.to_dict()}
    if isinstance(found, Mixed):
        return found.parameters()
    return {**found.parameters(), **origin(found)}


class Contender(NamedTuple):
    """One thing that is compared."""

    name: str
    make_cache: Callable[[], Cache]
    """An empty cache of it."""
    better_layers: tuple[int, ...] = ()
    """Full-attention layers that have the better of two methods."""


def contender(
    what: str | Method,
    model_config: PreTrainedConfig,
    calibration: Callable[[], Sequence[LayerStates]],
    sensitivity: Callable[[Method], Sequence[float]],
) -> Contender:
    """A contender (see :func:`resolve`) on one model.

    Args:
        what: the contender.
        model_config: ``model.config``.
        calibration: states of every full-attention layer on other text; called if needed.
        sensitivity: what a method does to the model in each of them, on other text; likewise.
    """
    found, name = resolve(what), name_of(what)
    if isinstance(found, str):
        return Contender(name, lambda: DynamicCache(config=model_config))
    if isinstance(found, Mixed):
        count = len(full_layers(model_config))
        chosen = found.choose(count, sensitivity)
        each = [found.methods[layer in chosen] for layer in range(count)]
        return Contender(name, lambda: MethodCache(model_config, each), chosen)
    if isinstance(found, Oscar) and name.endswith(REAL_CACHE):
        config = found.config
        return Contender(name, lambda: OscarCache(model_config, config))
    methods = [found]
    if found.needs_calibration:
        methods = [found.for_layer(states) for states in calibration()]
    return Contender(name, lambda: MethodCache(model_config, methods))


class Bits(NamedTuple):
    """What a cache stores per element of its full-attention layers."""

    all: float
    """Everything, full-precision tokens and the tables of a layer included."""
    quantized: float | None
    """The quantized tokens alone: what a long context comes to."""
    length: int | None
    """Tokens of a sequence, where there are quantized layers."""


FULL_BITS = Bits(FULL_PRECISION_BITS, None, None)


def bits_of(cache: Cache) -> Bits:
    """Counts what ``cache`` holds."""
    stored = quantized = elements = quantized_elements = 0.0
    longest = 0
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, MethodLayer):
            count, bits, length = layer.quantized, layer.bits, layer.length
            channels = layer.keys.shape[-1] + layer.values.shape[-1]
            per_token = layer.keys.shape[0] * layer.keys.shape[1] * channels
            each = bits_per_element(layer.method, layer.keys, layer.values, length, count, bits)
        elif isinstance(layer, OscarLayer) and layer.packed is not None:
            packed, layout = layer.packed, layer.packed.layout
            count, length = PAGE_TOKENS * packed.pages_per_sequence[0], packed.max_length
            per_token = layout.num_kv_heads * (layout.head_dim + layout.value_dim)
            per_token *= packed.batch_size
            bits = layout.bits_per_element * count * per_token
            each = (bits / per_token + FULL_PRECISION_BITS * (length - count)) / length
        else:
            continue
        longest = max(longest, length)
        stored, elements = stored + each * length * per_token, elements + length * per_token
        quantized, quantized_elements = quantized + bits, quantized_elements + count * per_token
    if not elements:
        return FULL_BITS
    alone = quantized / quantized_elements if quantized_elements else None
    return Bits(stored / elements, alone, longest)
