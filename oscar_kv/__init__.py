"""OScaR: a KV cache in about 2 bits per element, without calibration (arXiv 2605.19660)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oscar_kv.config import OscarConfig
from oscar_kv.kernels import decode_attention, dequantize, extend_attention, quantize
from oscar_kv.storage.packed import PackedKV

if TYPE_CHECKING:
    from oscar_kv.integrations.transformers import OscarCache

__version__ = "0.1.0"

__all__ = [
    "OscarCache",
    "OscarConfig",
    "PackedKV",
    "decode_attention",
    "dequantize",
    "extend_attention",
    "quantize",
]


def __getattr__(name: str) -> Any:
    # Importing Transformers takes seconds; those who do not use it should not wait.
    if name == "OscarCache":
        from oscar_kv.integrations.transformers import OscarCache

        return OscarCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
