"""Whether a model can have a method, tried on one block of tokens before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.evaluation.cache import full_layers, name_of, resolve
from oscar_kv.evaluation.methods import Method
from oscar_kv.evaluation.mixed import Mixed
from oscar_kv.integrations.models import cache_layers
from oscar_kv.planner import LayerShape, layer_shape


def require_fit(what: str | Method, model_config: PreTrainedConfig) -> None:
    """Raises ValueError if a contender (:func:`~oscar_kv.evaluation.cache.resolve`) cannot quantize
    the heads of a model, or wants layers that it does not have."""
    found = resolve(what)
    if isinstance(found, Mixed):
        count = len(full_layers(model_config))
        if not found.fits(count):
            raise ValueError(
                f"method {what!r}: layers={found.layers}, and the model has {count} "
                "full-attention layers"
            )
    methods = found.methods if isinstance(found, Mixed) else (found,)
    shapes = {layer_shape(*layer) for layer in cache_layers(model_config)}
    for shape in shapes:
        for one in methods:
            if isinstance(one, Method) and shape is not None and shape.quantized:
                _try(name_of(what), one, shape)


def fitting(names: Iterable[str], model_config: PreTrainedConfig) -> tuple[list[str], list[str]]:
    """Those of ``names`` that a model can have, and what is wrong with the others."""
    fit, wrong = [], []
    for name in names:
        try:
            require_fit(name, model_config)
            fit.append(name)
        except ValueError as error:
            wrong.append(str(error))
    return fit, wrong


def _try(name: str, method: Method, shape: LayerShape) -> None:
    if method.needs_calibration:
        return
    draw = torch.Generator().manual_seed(0)
    sizes = 1, shape.num_kv_heads, method.block_tokens
    keys = torch.randn(*sizes, shape.head_dim, generator=draw)
    values = torch.randn(*sizes, shape.value_head_dim, generator=draw)
    heads = f"{shape.num_kv_heads} KV heads of {shape.head_dim} channels"
    try:
        read_keys, read_values, bits = method.quantize(keys.clone(), values.clone(), 0)
    except Exception as error:  # a method of others can fail in any way
        what = str(error) or type(error).__name__
        raise ValueError(f"method {name!r} cannot quantize {heads}: {what}") from error
    for part, given, read in (("keys", keys, read_keys), ("values", values, read_values)):
        if read.shape != given.shape or not read.isfinite().all():
            raise ValueError(
                f"method {name!r} on {heads}: it reads {part} as {tuple(read.shape)}; expected "
                f"finite numbers of the shape {tuple(given.shape)} that it was given"
            )
    if not bits > 0:
        raise ValueError(
            f"method {name!r}: bits={bits}; expected every bit that it stores for the block"
        )
