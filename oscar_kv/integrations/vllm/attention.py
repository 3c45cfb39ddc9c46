"""What vLLM calls in every step: the metadata builder, once, and the attention of each layer."""
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)

from oscar_kv.config import PAGE_TOKENS, OscarConfig
from oscar_kv.integrations.vllm.plugin import KV_CACHE_DTYPE
from oscar_kv.integrations.vllm.recent import RecentCache
from oscar_kv.integrations.vllm.rows import QUERY_SLOTS, DecodeRows, Ring, Rows, group_rows
from oscar_kv.integrations.vllm.step import attend_step, has_kernels, row_operations
from oscar_kv.storage.layout import PageLayout

_DRAFTS = ("ngram", "ngram_gpu", "suffix")
"""Ways to speculate without a KV cache for drafts."""

_DRAFTS_WITH_LAYERS = ("draft_model", "eagle", "eagle3")
"""Those with one. vLLM's first model runner takes a draft's layers to have one cache each, where
ours have two."""

_SERVED = PageLayout(OscarConfig.compact(), 128, 8)
"""Pages like any other: a device has kernels for all that vLLM may ask the backend for, or none."""


@dataclass
class OscarMetadata:
    """One step; the layers share it."""

    num_tokens: int
    groups: list[Rows]
    most_pages: int


class OscarMetadataBuilder(AttentionMetadataBuilder[OscarMetadata]):
    """Groups the requests of a step by how many tokens they compute, and locates their rows.

    A step in which all requests decode has its rows where the one before it had them, and nothing
    of its metadata depends on lengths: a CUDA graph of it serves them all.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if kv_cache_spec.page_size_padded is not None:
            # Kernels take a pool of pages without gaps.
            raise ValueError(
                "OSCAR_KV: vLLM padded the pages, because another layer has a larger KV cache"
            )
        self._most_requests = vllm_config.scheduler_config.max_num_seqs
        self._most_queries = 1 + vllm_config.num_speculative_tokens
        self._most_pages = vllm_config.model_config.max_model_len // PAGE_TOKENS
        self._operations = row_operations(_SERVED, device)
        self._decode_rows: DecodeRows | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        device = torch.device(vllm_config.device_config.device)
        if has_kernels(_SERVED, device):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> OscarMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("OSCAR_KV serves causal attention only")
        lengths = common.query_start_loc_cpu[: common.num_reqs + 1].diff().tolist()
        width = common.block_table_tensor.shape[1]
        if self._decode_rows is None:
            self._decode_rows = DecodeRows(
                self._most_requests, self._most_queries, width, self.device
            )
        rows = self._decode_rows.of(lengths, common.num_actual_tokens)
        if rows is None:
            groups = group_rows(lengths, width, self.device)
            most_pages = common.max_seq_len // PAGE_TOKENS
        else:
            groups, most_pages = [rows], self._most_pages
        for group in groups:
            self._operations.locate(
                group, common.query_start_loc, common.seq_lens, common.block_table_tensor
            )
        return OscarMetadata(common.num_actual_tokens, groups, most_pages)


def other_heads(drafts: Any) -> bool:
    """Whether a draft's pages are not as large as the model's, for which vLLM would pad either."""
    models = (drafts.target_model_config, drafts.draft_model_config)
    return len({(m.get_head_size(), m.get_total_num_kv_heads()) for m in models}) > 1


class OscarAttention(AttentionImpl[OscarMetadata]):
    """The attention of one layer. ``config`` is set by the backend."""

    config: ClassVar[OscarConfig]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        vllm_config = get_current_vllm_config()
        skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
        parallel = vllm_config.parallel_config
        drafts = getattr(vllm_config.speculative_config, "method", None)
        served = _DRAFTS
        if vllm_config.use_v2_model_runner:
            served += _DRAFTS_WITH_LAYERS
        refused = {
            "sliding-window layers": sliding_window is not None,
            "ALiBi": alibi_slopes is not None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that share the KV cache of another": kv_sharing_target_layer_name is not None,
            "--kv-cache-dtype-skip-layers": bool(skipped),
            "decode context parallelism": parallel.decode_context_parallel_size > 1,
            "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
            f"drafts by {drafts} with this model runner of vLLM, only by {', '.join(served)}": (
                drafts not in (None, *served)
            ),
            "drafts of a model with other KV heads": (
                drafts in _DRAFTS_WITH_LAYERS and other_heads(vllm_config.speculative_config)
            ),
            "KV connectors": vllm_config.kv_transfer_config is not None,
            f"--kv-cache-dtype {kv_cache_dtype}": kv_cache_dtype not in ("auto", KV_CACHE_DTYPE),
            **{name: value is not None for name, value in others.items()},
        }
        for what, asked in refused.items():
            if asked:
                raise ValueError(f"the OSCAR_KV attention backend does not support {what}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.layout = PageLayout(self.config, head_size, self.num_kv_heads)
        self.most_requests = vllm_config.scheduler_config.max_num_seqs
        self.most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        if drafts == "draft_model":  # vLLM leaves room for a token more of each request
            self.most_tokens -= self.most_requests
        self.longest = vllm_config.model_config.max_model_len
        self.recent: RecentCache

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Adds the ring to vLLM's layers: here the layer of this attention has its name."""
        vllm_config = get_current_vllm_config()
        layers = vllm_config.compilation_config.static_forward_context
        name = next(n for n, layer in layers.items() if getattr(layer, "impl", None) is self)
        self.recent = RecentCache(
            name,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            value_dim=self.head_size,
            dtype=act_dtype,
            page_bytes=self.num_kv_heads * self.layout.page_bytes,
            drafts=vllm_config.num_speculative_tokens,
        )
        layers[self.recent.name] = self.recent

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: OscarMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's new tokens ``[N, heads, D]``, written to ``output``."""
        if attn_metadata is None:
            if len(query) < self.most_tokens:
                return output.zero_()
            self._rehearse(query, key, value, output)
            return output
        step = get_forward_context().attn_metadata
        step = step[0] if isinstance(step, list) else step
        table = step[self.recent.name].block_table
        count = attn_metadata.num_tokens
        attend_step(
            query[:count],
            key[:count],
            value[:count],
            kv_cache.flatten(2),
            Ring(self.recent.kv_cache, table, self.recent.spec.blocks_per_request),
            attn_metadata.groups,
            output[:count],
            layout=self.layout,
            most_pages=attn_metadata.most_pages,
            scaling=self.scale,
            softcap=self.softcap,
        )
        return output

    def _rehearse(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """The largest steps there may be, and small ones, in pools of their own.

        vLLM measures what these take before it gives the rest to the cache; and afterwards every
        kernel that any step needs is compiled: for every number of query slots, with as many
        requests as there may be, and with one, whose work is divided by how long it is.
        """
        spec, device, tokens = self.recent.spec, query.device, len(query)
        heads, blocks = self.num_kv_heads, spec.blocks_per_request
        # All requests have the same pages, and one ring: what they read means nothing.
        pool = torch.zeros(
            (1 + tokens // PAGE_TOKENS, heads, self.layout.page_bytes),
            dtype=torch.uint8,
            device=device,
        )
        shape = (1 + blocks, heads, spec.block_size, 2 * self.head_size)
        recent = torch.zeros(shape, dtype=key.dtype, device=device)
        ring_blocks = torch.arange(1, 1 + blocks, dtype=torch.int32, device=device)
        width = -(-self.longest // PAGE_TOKENS)
        pages = torch.arange(width, dtype=torch.int32, device=device) % len(pool)

        def step(requests: int, length: int, most_pages: int) -> None:
            groups = group_rows([length] * requests, width, device)
            begins = length * torch.arange(requests + 1, dtype=torch.int32, device=device)
            for rows in groups:
                row_operations(self.layout, device).locate(
                    rows, begins, begins.diff(), pages.expand(requests, -1)
                )
            count = requests * length
            attend_step(
                query[:count],
                key[:count],
                value[:count],
                pool,
                Ring(recent, ring_blocks.expand(requests, -1), blocks),
                groups,
                output[:count],
                layout=self.layout,
                most_pages=most_pages,
                scaling=self.scale,
                softcap=self.softcap,
            )

        most_pages = self.longest // PAGE_TOKENS
        powers = {1 << n for n in range(most_pages.bit_length())}
        longest = min(tokens, self.longest)
        step(min(tokens // longest, self.most_requests), longest, most_pages)
        for length in (1, *(1 + slots for slots in QUERY_SLOTS[:-1])):
            if length <= longest:
                step(min(tokens // length, self.most_requests), length, most_pages)
                for pages_of_one in sorted({0, most_pages, *powers}):
                    step(1, length, pages_of_one)
