"""The entry point that vLLM calls in each of its processes, as often as it likes."""
# pyright: reportMissingImports=false

from __future__ import annotations

import copyreg
import logging
from typing import Any

BACKENDS = {"OSCAR_KV": "compact", "OSCAR_KV_QUALITY": "quality", "OSCAR_KV_HIGH": "high"}
"""What ``--attention-backend`` may name, and the preset that it stands for."""

KV_CACHE_DTYPE = "oscar_kv"
"""What ``--kv-cache-dtype`` may name from vLLM 0.33 on; each backend means its own pages by it."""


def register() -> None:
    """Registers the backends and the cache dtype. Nothing of vLLM changes for who uses neither."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, preset in BACKENDS.items():
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, f"oscar_kv.integrations.vllm.backend.{preset.title()}")
    copyreg.pickle(AttentionBackendEnum, _reduce)
    if current_platform.is_cpu():
        # The CPU platform asks for this one whatever the user chose.
        register_backend(AttentionBackendEnum.CPU_ATTN, "oscar_kv.integrations.vllm.cpu.Chosen")
    _register_cache_dtype()


def _reduce(backend: Any) -> tuple[Any, ...]:
    """How a backend's name travels to a worker, which may read it before it has any plugin."""
    if backend.name in BACKENDS:
        return _backend_named, (backend.name,)
    return backend.__reduce_ex__(2)


def _backend_named(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[name]


def _register_cache_dtype() -> None:
    import torch
    from vllm.config import cache

    if not hasattr(cache, "register_kv_cache_dtype"):  # vLLM 0.32: the backend alone decides
        logging.getLogger(__name__).debug("no custom KV cache dtypes in this vLLM")
        return
    if cache.is_known_kv_cache_dtype(KV_CACHE_DTYPE):
        return

    @cache.register_kv_cache_dtype(KV_CACHE_DTYPE)
    class OscarDType:
        name = KV_CACHE_DTYPE

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> object:
            from vllm.v1.kv_cache_interface import KVQuantMode

            return KVQuantMode.CUSTOM
