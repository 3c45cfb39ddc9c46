"""The attention backend of vLLM's CPU platform, which does not ask what the user chose."""
# pyright: reportMissingImports=false

from __future__ import annotations

from oscar_kv.integrations.vllm.plugin import BACKENDS


def __getattr__(name: str) -> type:
    """``Chosen``: one of ours if ``--attention-backend`` names it, else vLLM's own."""
    if name != "Chosen":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from oscar_kv.integrations.vllm import backend

    chosen = get_current_vllm_config().attention_config.backend
    if chosen is not None and chosen.name in BACKENDS:
        return getattr(backend, BACKENDS[chosen.name].title())
    return CPUAttentionBackend
