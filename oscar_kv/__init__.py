"""OScaR: a KV cache in about 2 bits per element, without calibration (arXiv 2605.19660)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oscar_kv.config import OscarConfig
from oscar_kv.kernels import decode_attention, dequantize, extend_attention, quantize
from oscar_kv.storage.packed import PackedKV

if TYPE_CHECKING:
    from oscar_kv.integrations.files import load_cache, save_cache
    from oscar_kv.integrations.transformers import OscarCache

__version__ = "0.1.0"

__all__ = [
    "OscarCache",
    "OscarConfig",
    "PackedKV",
    "decode_attention",
    "dequantize",
    "extend_attention",
    "load_cache",
    "quantize",
    "save_cache",
]

# Importing Transformers takes seconds; those who do not use it should not wait.
_LAZY = {
    "OscarCache": "oscar_kv.integrations.transformers",
    "load_cache": "oscar_kv.integrations.files",
    "save_cache": "oscar_kv.integrations.files",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
