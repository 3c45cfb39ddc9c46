"""Packed sequences in safetensors files, with their config and a format version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oscar_kv.config import OscarConfig
from oscar_kv.storage.offload import Staging
from oscar_kv.storage.packed import PackedKV

FORMAT_VERSION = 2
"""Raised whenever the page layout or this file's structure changes."""

_FORMAT = "oscar-kv"
_DTYPES = {str(d): d for d in (torch.float16, torch.bfloat16, torch.float32)}


def save_packed(
    path: str | Path, caches: Mapping[str, PackedKV], extra: Mapping[str, Tensor] | None = None
) -> None:
    """Writes packed sequences to one safetensors file.

    Only what is in use is written: pages that sequences share are written once.

    Args:
        path: of the file; an existing one is replaced.
        caches: by name, e.g. of the layer.
        extra: further tensors to store beside them.

    Raises:
        ValueError: if there is nothing to save.
    """
    if not caches:
        raise ValueError("caches is empty: expected at least one PackedKV")
    tensors: dict[str, Tensor] = {f"extra/{k}": v.contiguous() for k, v in (extra or {}).items()}
    described: dict[str, Any] = {}
    for name, packed in caches.items():
        state, parts = packed.export()
        described[name] = {
            "config": packed.config.to_dict(),
            "num_kv_heads": packed.layout.num_kv_heads,
            "head_dim": packed.layout.head_dim,
            "value_head_dim": packed.layout.value_head_dim,
            "dtype": str(packed.dtype),
            "sequences": state,
        }
        tensors |= {f"cache/{name}/{part}": t.contiguous() for part, t in parts.items()}
    metadata = {"format": _FORMAT, "version": str(FORMAT_VERSION), "caches": json.dumps(described)}
    save_file(tensors, str(path), metadata=metadata)


def load_packed(
    path: str | Path, device: torch.device | str = "cpu", staging: Staging | None = None
) -> tuple[dict[str, PackedKV], dict[str, Tensor]]:
    """Reads what :func:`save_packed` wrote.

    Args:
        path: of the file.
        device: where the sequences will live.
        staging: of this device, if pages are to stay in CPU memory.

    Returns:
        The packed sequences by name, and the extra tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, is of another format version, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read_to = "cpu" if staging is not None else str(device)
    try:
        with safe_open(str(path), framework="pt", device=read_to) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not an {_FORMAT} file")
    if metadata.get("version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path}: format version {metadata.get('version')}: expected {FORMAT_VERSION}"
        )
    try:
        return _rebuild(json.loads(metadata["caches"]), tensors, device, staging)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def _rebuild(
    described: dict[str, Any],
    tensors: dict[str, Tensor],
    device: torch.device | str,
    staging: Staging | None,
) -> tuple[dict[str, PackedKV], dict[str, Tensor]]:
    caches = {}
    for name, entry in described.items():
        packed = PackedKV(
            OscarConfig.from_dict(entry["config"]),
            batch_size=len(entry["sequences"]),
            num_kv_heads=entry["num_kv_heads"],
            head_dim=entry["head_dim"],
            value_head_dim=entry["value_head_dim"],
            dtype=_DTYPES[entry["dtype"]],
            device=device,
            staging=staging,
        )
        prefix = f"cache/{name}/"
        parts = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        packed.restore(entry["sequences"], parts)
        caches[name] = packed
    others = {k.removeprefix("extra/"): t for k, t in tensors.items() if k.startswith("extra/")}
    extra = {name: tensor.to(device) for name, tensor in others.items()}
    return caches, extra
