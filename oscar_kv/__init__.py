"""OScaR: a KV cache in about 2 bits per element, without calibration (arXiv 2605.19660)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oscar_kv.config import OscarConfig

if TYPE_CHECKING:
    from oscar_kv.integrations.encoder_decoder import OscarEncoderDecoderCache
    from oscar_kv.integrations.files import load_cache, save_cache
    from oscar_kv.integrations.transformers import OscarCache
    from oscar_kv.kernels import decode_attention, dequantize, extend_attention, quantize
    from oscar_kv.storage.packed import PackedKV

__version__ = "0.1.0"

__all__ = [
    "OscarCache",
    "OscarConfig",
    "OscarEncoderDecoderCache",
    "PackedKV",
    "decode_attention",
    "dequantize",
    "extend_attention",
    "load_cache",
    "quantize",
    "save_cache",
]

# Importing torch and Transformers takes seconds; who does not need them should not wait.
_HOMES = {
    "oscar_kv.integrations.encoder_decoder": ("OscarEncoderDecoderCache",),
    "oscar_kv.integrations.files": ("load_cache", "save_cache"),
    "oscar_kv.integrations.transformers": ("OscarCache",),
    "oscar_kv.kernels": ("decode_attention", "dequantize", "extend_attention", "quantize"),
    "oscar_kv.storage.packed": ("PackedKV",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
