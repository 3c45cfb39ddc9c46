"""The exact tokens of blocks that are not full yet: a KV cache of its own, owned by the scheduler.

A page holds 128 tokens, and is written when all are there. Until then they lie in a ring: a few
blocks that every running request holds from its first step to its last, out of the same pool as its
pages. The scheduler hands them out and takes them back with the request, so that no bookkeeping of
ours could get preemption, aborts or reordered batches wrong.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from oscar_kv.integrations.vllm.rows import ring_shape


@dataclass(frozen=True, kw_only=True)
class RecentSpec(CircularBufferSpec):
    """``blocks_per_request`` blocks of ``block_size`` exact tokens, used in turn."""

    blocks_per_request: int

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.blocks_per_request * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        # vLLM's first model runner computes a slot for every token of every cache, also of this
        # one, which has no use for it: the table must be as wide as that reads.
        return max(self.blocks_per_request, -(-max_len // self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class RecentManager(CircularBufferManager):
    """Claims a request's ring with its first block and frees it with its last."""

    kv_cache_spec: RecentSpec

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[Any]:
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return []
        claimed = self.block_pool.get_new_blocks(self.kv_cache_spec.blocks_per_request)
        blocks.extend(claimed)
        return claimed

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        if self.req_to_blocks.get(request_id):
            return 0
        return self.kv_cache_spec.blocks_per_request


# vLLM registers its own specs on first use, but not once somebody else has registered one.
if KVCacheSpecRegistry.get_manager_class(CircularBufferSpec) is None:
    register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(RecentSpec, RecentManager)


@dataclass
class RecentMetadata:
    """What a step's attention needs of this cache."""

    block_table: torch.Tensor
    """int32 ``[requests, >= blocks_per_request]``."""


class RecentMetadataBuilder(AttentionMetadataBuilder[RecentMetadata]):
    """Hands out the block table, which vLLM keeps in one place."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> RecentMetadata:
        return RecentMetadata(common_attn_metadata.block_table_tensor)


class RecentBackend(AttentionBackend):
    """Storage only."""

    @staticmethod
    def get_name() -> str:
        return "OSCAR_KV_RECENT"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("nothing attends to this cache but its layer's backend")

    @staticmethod
    def get_builder_cls() -> type[RecentMetadataBuilder]:
        return RecentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class RecentCache(AttentionLayerBase):
    """The ring of one attention layer, in vLLM's list of layers beside it.

    Args:
        name: the attention layer's, to which ``.recent`` is added.
        num_kv_heads, head_dim, value_dim: of that layer, on this rank.
        dtype: of the model.
        page_bytes: of all heads' pages of 128 tokens; a block of the ring may be no larger.
        drafts: speculative tokens of a step, which are stored before they are accepted.
    """

    def __init__(
        self,
        name: str,
        *,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        page_bytes: int,
        drafts: int,
    ) -> None:
        self.name = f"{name}.recent"
        self.kv_cache = torch.tensor([])
        token_bytes = num_kv_heads * (head_dim + value_dim) * dtype.itemsize
        blocks, block_tokens = ring_shape(page_bytes, token_bytes, drafts)
        self.spec = RecentSpec(
            block_size=block_tokens,
            blocks_per_request=blocks,
            num_kv_heads=num_kv_heads,
            head_size=head_dim,
            head_size_v=value_dim,
            dtype=dtype,
            page_size_padded=page_bytes,
            dcp_sharded=False,
        )

    def get_attn_backend(self) -> type[RecentBackend]:
        return RecentBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> RecentSpec:
        return self.spec
