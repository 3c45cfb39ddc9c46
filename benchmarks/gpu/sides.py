"""The two sides of the model benchmark, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from benchmarks.gpu import oracle
from benchmarks.gpu.states import bytes_read, config_of, random_states
from benchmarks.gpu.static_cache import StaticCache
from oscar_kv import decode_attention
from oscar_kv.config import PAGE_TOKENS
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.planner import ModelShape

FILL_BYTES = 1 << 29
"""Random states that are made and stored at a time."""


class Side(ABC):
    """One kind of cache.

    Args:
        model: whose cache it is, with the same heads in every layer.
    """

    name: str

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype

    @abstractmethod
    def cache(self, batch: int, capacity: int) -> Any:
        """An empty cache for ``batch`` sequences of ``capacity`` tokens."""

    @abstractmethod
    def serve(self, cache: Any) -> None:
        """Makes the model attend with ``cache``, which is filled, in the fastest way."""

    @abstractmethod
    def exact(self, cache: Any) -> Cache:
        """A cache of the same states for the model's plain ``"sdpa"`` attention."""

    @abstractmethod
    def bytes_per_sequence(self, capacity: int) -> int:
        """Memory of one sequence, by arithmetic."""

    @abstractmethod
    def bytes_read(self, cache: Any) -> int:
        """Bytes that a step cannot avoid reading."""

    @abstractmethod
    def attention_error(self, cache: Any) -> float:
        """Error of the attention of the last layer against the float64 oracle, random query."""

    def filled(self, batch: int, context: int, capacity: int) -> Any:
        """A cache that holds ``context`` tokens of random states.

        All layers get the same states, one chunk over and over, through ``update`` as a prompt
        would: valid pages in memory of their own, without the cost of a real prefill.
        """
        cache = self.cache(batch, capacity)
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        token = 2 * batch * heads * dim * self.dtype.itemsize
        chunk = max(1, FILL_BYTES // token // PAGE_TOKENS) * PAGE_TOKENS
        size = (batch, heads, min(chunk, context), dim)
        torch.manual_seed(context)
        keys, values = random_states(size, self.device, self.dtype)
        for begin in range(0, context, chunk):
            count = min(chunk, context - begin)
            for layer in range(self.config.num_hidden_layers):
                cache.update(keys[:, :, :count], values[:, :, :count], layer)
        return cache

    def query(self, batch: int) -> Tensor:
        """A random query of one new token."""
        size = (batch, self.config.num_attention_heads, 1, self.config.head_dim)
        return torch.randn(size, device=self.device, dtype=self.dtype)


class Bf16(Side):
    """A preallocated BF16 cache and the split-K kernel."""

    name = "bf16"

    def cache(self, batch: int, capacity: int) -> StaticCache:
        return StaticCache(self.config, batch, capacity, self.device, self.dtype)

    def serve(self, cache: StaticCache) -> None:
        cache.serve(self.model)

    def exact(self, cache: StaticCache) -> Cache:
        exact = DynamicCache(config=self.config)
        for layer, (keys, values) in enumerate(cache.states):
            exact.update(keys[:, :, : cache.length], values[:, :, : cache.length], layer)
        return exact

    def bytes_per_sequence(self, capacity: int) -> int:
        return ModelShape.from_config(self.config).nbytes("bf16", capacity)

    def bytes_read(self, cache: StaticCache) -> int:
        keys, _ = cache.states[0]
        return cache.nbytes // keys.shape[2] * cache.length

    def attention_error(self, cache: StaticCache) -> float:
        keys, values = (part[:, :, : cache.length] for part in cache.states[-1])
        query = self.query(keys.shape[0])
        out = cache.attend(query, len(cache.layers) - 1)
        return oracle.dense_error(out, query, keys, values)


class Oscar(Side):
    """`OscarCache` with room for all tokens, and its ``"oscar"`` attention."""

    def __init__(self, model: PreTrainedModel, preset: str) -> None:
        super().__init__(model)
        self.name = self.preset = preset

    def cache(self, batch: int, capacity: int) -> OscarCache:
        return OscarCache(self.config, config_of(self.preset), max_tokens=capacity)

    def serve(self, cache: OscarCache) -> None:
        self.model.set_attn_implementation("oscar")
        layer: Any = cache.layers[0]
        cache.reserve(layer.max_tokens - cache.get_seq_length())

    def exact(self, cache: OscarCache) -> Cache:
        return cache  # hands out dequantized states

    def bytes_per_sequence(self, capacity: int) -> int:
        return ModelShape.from_config(self.config).nbytes(self.preset, capacity + PAGE_TOKENS)

    def bytes_read(self, cache: OscarCache) -> int:
        return sum(bytes_read(packed) for packed in _packed(cache))

    def attention_error(self, cache: OscarCache) -> float:
        packed = _packed(cache)[-1]
        query = self.query(packed.batch_size)
        return oracle.packed_error(decode_attention(query, packed), query, packed)


def _packed(cache: Any) -> list[Any]:
    return [layer.packed for layer in cache.layers]
