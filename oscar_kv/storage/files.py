"""Packed sequences in safetensors files, with their config and a format version."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oscar_kv.config import OscarConfig
from oscar_kv.replacing import replacing
from oscar_kv.storage.offload import Staging
from oscar_kv.storage.packed import PackedKV

FORMAT_VERSION = 4
"""Raised whenever the page layout or this file's structure changes."""

_FORMAT = "oscar-kv"
_DTYPES = {str(d): d for d in (torch.float16, torch.bfloat16, torch.float32)}


class Contents(NamedTuple):
    """What a file holds."""

    caches: dict[str, PackedKV]
    """Packed sequences by name."""
    extra: dict[str, Tensor]
    about: dict[str, Any]


def save_packed(
    path: str | Path,
    caches: Mapping[str, PackedKV],
    extra: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes packed sequences to one safetensors file.

    Only what is in use is written: pages that sequences share are written once.

    Args:
        path: of the file; an earlier one of ours is replaced, once the new one is whole.
        caches: by name, e.g. of the layer.
        extra: further tensors to store beside them.
        about: plain values to store beside them.

    Raises:
        ValueError: if there is nothing to save.
        FileExistsError: if something else is there.
        OSError: if the file cannot be written.
    """
    if not (caches or extra or about):
        raise ValueError("caches is empty: expected at least one PackedKV")
    _require_ours(Path(path))
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
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    text = json.dumps({"caches": described, "about": dict(about or {})})
    metadata = {
        "format": _FORMAT,
        "version": str(FORMAT_VERSION),
        "description": text,
        "checksum": checksum(text, tensors),
    }
    with replacing(path) as part:
        try:
            save_file(tensors, str(part), metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_about(path: str | Path) -> dict[str, Any]:
    """The plain values that :func:`save_packed` stored, whatever the format version.

    Only the head of the file is read, and its checksum is not verified.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file.
    """
    with _opened(path) as (_, metadata):
        pass
    try:
        return dict(json.loads(metadata["description"])["about"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def load_packed(
    path: str | Path, device: torch.device | str = "cpu", staging: Staging | None = None
) -> Contents:
    """Reads what :func:`save_packed` wrote.

    Args:
        path: of the file.
        device: where the sequences will live.
        staging: of this device, if pages are to stay in CPU memory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, is of another format version, or is damaged.
    """
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path}: format version {metadata.get('version')}, expected {FORMAT_VERSION}: "
            "compute it again"
        )
    text = metadata.get("description", "")
    if metadata.get("checksum") != checksum(text, tensors):
        raise ValueError(f"{path}: damaged (its checksum is not that of its contents)")
    try:
        description = json.loads(text)
        if staging is None:
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        caches = _rebuild(description["caches"], tensors, device, staging)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    others = {k.removeprefix("extra/"): t for k, t in tensors.items() if k.startswith("extra/")}
    extra = {name: tensor.to(device) for name, tensor in others.items()}
    return Contents(caches, extra, description["about"])


def _require_ours(path: Path) -> None:
    """Raises FileExistsError where a file of others would be lost."""
    if path.is_file() and not is_ours(path):
        raise FileExistsError(f"{path}: exists and is not an {_FORMAT} file: choose another name")


def is_ours(path: Path) -> bool:
    """Whether a file was written by :func:`save_packed`, of whatever version, damaged or not."""
    try:
        with _opened(path):
            return True
    except (ValueError, OSError):
        return False


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file of :func:`save_packed` and its metadata; raises what :func:`read_about` does."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path}: not an {_FORMAT} file")
            yield file, metadata
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def checksum(description: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of a description and of tensors in CPU memory, names included, in hexadecimal."""
    crc = zlib.crc32(description.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _rebuild(
    described: dict[str, Any],
    tensors: dict[str, Tensor],
    device: torch.device | str,
    staging: Staging | None,
) -> dict[str, PackedKV]:
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
    return caches
