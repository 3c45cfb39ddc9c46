"""A whole :class:`OscarCache` in one safetensors file: a prompt computed once, reused later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from oscar_kv.integrations.fingerprint import difference, fingerprint, require_model
from oscar_kv.integrations.layer import OscarLayer, layer_memory
from oscar_kv.integrations.models import identity
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.storage.files import load_packed, save_packed
from oscar_kv.storage.offload import Staging


def save_cache(
    cache: OscarCache, path: str | Path, model: Any, *, about: Mapping[str, Any] | None = None
) -> None:
    """Writes everything ``cache`` holds to ``path``, and the fingerprint of ``model``.

    An earlier file of ours there stays whole until this one is.

    Args:
        cache: holds at least one token.
        path: of the file; its folder exists.
        model: that the cache was filled by.
        about: plain values to store beside it, for :func:`oscar_kv.storage.files.read_about`.

    Raises:
        TypeError: if ``cache`` is another cache, or ``model`` no model.
        ValueError: if the cache is empty, was made for another model, or has layers whose states
            have no file format here (linear attention).
        FileExistsError: if something else than such a file is there.
        OSError: if the file cannot be written.
    """
    if not isinstance(cache, OscarCache):
        raise TypeError(f"cache is a {type(cache).__name__}: only an OscarCache can be saved")
    require_model(model)
    if other := difference(cache.made_for, identity(model.config)):
        raise ValueError(f"the cache {other}")
    cache.end_pass()
    packed, extra, padding = {}, {}, {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, OscarLayer):
            if layer.packed is not None:
                packed[str(index)], padding[str(index)] = layer.packed, layer.padding
        elif type(layer) is DynamicSlidingWindowLayer:
            if layer.is_initialized:
                extra |= _sliding_states(index, layer)
        elif any(layer_memory(layer).values()):
            raise ValueError(f"layer {index} is a {type(layer).__name__}: it cannot be saved")
    if not packed:
        raise ValueError("the cache is empty: expected one that has seen tokens")
    ours = {"fingerprint": fingerprint(model), "padding": padding}
    save_packed(path, packed, extra, {**(about or {}), **ours})


def load_cache(
    path: str | Path,
    model: Any,
    device: torch.device | str | None = None,
    *,
    offloading: bool = False,
) -> OscarCache:
    """Reads what :func:`save_cache` wrote.

    Args:
        path: of the file.
        model: that the cache is for: the one that filled it, loaded again or not.
        device: where the cache will live; ``model.device`` if omitted.
        offloading: as in :class:`OscarCache`; whether the saved one was offloaded does not matter.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if ``model`` is no model.
        ValueError: if it is no such file, is damaged, or was made by another model: with other
            weights, settings or dtype.
    """
    require_model(model)
    place = model.device if device is None else device
    staging = Staging(place) if offloading else None
    packed, extra, about = load_packed(path, place, staging)
    if "fingerprint" not in about:
        raise ValueError(f"{path}: not written by save_cache, so it does not say by which model")
    if other := difference(about["fingerprint"], fingerprint(model)):
        raise ValueError(f"{path}: {other}")
    cache = OscarCache(model.config, offloading=offloading)  # layers adopt the file's configs
    if cache.staging is not None and staging is not None:
        cache.staging[staging.device] = staging
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, OscarLayer) and str(index) in packed:
            layer.adopt(packed[str(index)], about["padding"][str(index)])
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
