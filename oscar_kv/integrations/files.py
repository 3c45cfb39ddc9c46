"""A whole :class:`OscarCache` in one safetensors file: a prompt computed once, reused later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.integrations.layer import OscarLayer, layer_memory
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.storage.files import load_packed, save_packed
from oscar_kv.storage.offload import Staging


def save_cache(
    cache: OscarCache, path: str | Path, *, about: Mapping[str, Any] | None = None
) -> None:
    """Writes everything ``cache`` holds to ``path``.

    Args:
        about: plain values to store beside it, for :func:`oscar_kv.storage.files.read_about`.

    Raises:
        ValueError: if it is empty, or has layers whose states have no file format here
            (linear attention).
        OSError: if the file cannot be written; an earlier one is as it was.
    """
    packed, extra = {}, {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, OscarLayer):
            if layer.packed is not None:
                packed[str(index)] = layer.packed
        elif type(layer) is DynamicSlidingWindowLayer:
            if layer.is_initialized:
                extra |= _sliding_states(index, layer)
        elif any(layer_memory(layer).values()):
            raise ValueError(f"layer {index} is a {type(layer).__name__}: it cannot be saved")
    if not packed:
        raise ValueError("the cache is empty: expected one that has seen tokens")
    save_packed(path, packed, extra, {**(about or {}), "made_for": cache.made_for})


def load_cache(
    path: str | Path,
    model_config: PreTrainedConfig,
    device: torch.device | str = "cpu",
    *,
    offloading: bool = False,
) -> OscarCache:
    """Reads what :func:`save_cache` wrote.

    Args:
        path: of the file.
        model_config: config of the model that the cache is for.
        device: where the cache will live.
        offloading: as in :class:`OscarCache`; whether the saved one was offloaded does not matter.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, is damaged, or was written for another model.
    """
    staging = Staging(device) if offloading else None
    packed, extra, about = load_packed(path, device, staging)
    cache = OscarCache(model_config, offloading=offloading)  # layers adopt the file's configs
    if cache.staging is not None and staging is not None:
        cache.staging[staging.device] = staging
    made_for = about.get("made_for", {})
    for name in made_for.keys() & cache.made_for.keys():
        if made_for[name] != cache.made_for[name]:
            raise ValueError(
                f"{path}: made for a model with {name}={made_for[name]}: this one has "
                f"{cache.made_for[name]}"
            )
    quantized = {str(i) for i, layer in enumerate(cache.layers) if isinstance(layer, OscarLayer)}
    if quantized != packed.keys():
        raise ValueError(
            f"{path}: holds quantized layers {sorted(packed, key=int)}: this model has "
            f"{sorted(quantized, key=int)}"
        )
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, OscarLayer):
            layer.adopt(packed[str(index)])
        elif isinstance(layer, DynamicSlidingWindowLayer) and f"{index}/keys" in extra:
            keys, values = extra[f"{index}/keys"], extra[f"{index}/values"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            layer.cumulative_length = int(extra[f"{index}/length"])
    return cache


def _sliding_states(index: int, layer: DynamicSlidingWindowLayer) -> dict[str, Tensor]:
    assert layer.keys is not None
    assert layer.values is not None
    return {
        f"{index}/keys": layer.keys,
        f"{index}/values": layer.values,
        f"{index}/length": torch.tensor(layer.cumulative_length),
    }
