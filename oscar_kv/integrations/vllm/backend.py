"""The attention backends: one for each preset, ``--attention-backend OSCAR_KV`` being `compact`."""
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from oscar_kv.config import PAGE_TOKENS, OscarConfig
from oscar_kv.integrations.vllm.attention import OscarAttention, OscarMetadataBuilder
from oscar_kv.integrations.vllm.plugin import KV_CACHE_DTYPE
from oscar_kv.storage.layout import PageLayout


class Compact(AttentionBackend):
    """Decoder attention over packed pages. A block of vLLM's pool is a page of every KV head."""

    config: ClassVar[OscarConfig] = OscarConfig.compact()
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", KV_CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        return "OSCAR_KV"

    @classmethod
    def get_impl_cls(cls) -> Any:
        return type(f"{cls.__name__}Attention", (OscarAttention,), {"config": cls.config})

    @staticmethod
    def get_builder_cls() -> type[OscarMetadataBuilder]:
        return OscarMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [PAGE_TOKENS]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and 16 <= head_size <= 256

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The bytes of a page, as bytes per token and KV head."""
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"{cls.get_name()} serves full attention only: a layer asks for a "
                f"{type(spec).__name__}"
            )
        if spec.block_size != PAGE_TOKENS:
            raise ValueError(
                f"--block-size {spec.block_size}: {cls.get_name()} has pages of "
                f"{PAGE_TOKENS} tokens"
            )
        layout = PageLayout(cls.config, spec.head_size, spec.num_kv_heads, spec.head_size_v)
        return replace(
            spec, dtype=torch.uint8, state_content_bytes=layout.page_bytes // PAGE_TOKENS
        )


class Quality(Compact):
    """Key groups of 32."""

    config = OscarConfig.quality()

    @staticmethod
    def get_name() -> str:
        return "OSCAR_KV_QUALITY"


class High(Compact):
    """4-bit keys."""

    config = OscarConfig.high()

    @staticmethod
    def get_name() -> str:
        return "OSCAR_KV_HIGH"
