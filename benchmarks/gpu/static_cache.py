"""The BF16 side of the model benchmark: a preallocated cache whose lengths live on the GPU.

A step stores its key and value with one small kernel per layer and attends with the split-K kernel
(`splitk.py`), tuned for the shape. Transformers' own ``StaticCache`` would attend over the whole
capacity through a mask, and be slower.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

from benchmarks.gpu import baselines
from benchmarks.gpu.splitk import SplitK
from benchmarks.gpu.timing import copies_for
from oscar_kv.integrations.compile import untraced

ATTENTION = "bf16_static"
"""The name of its attention function."""


class StaticLayer(CacheLayerMixin):
    """``[B, H, capacity, D]`` keys and values of one layer."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: StaticCache, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.cache = cache
        self.keys, self.values = (
            torch.zeros(shape, dtype=cache.dtype, device=cache.lengths.device) for _ in range(2)
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Everything is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores states ``[B, H, T, D]``: a prompt behind `length`, a step as `lengths` say.

        Returns them as they came: `attend` finds what is stored, and a model that is compiled
        would be compiled again for tensors of another capacity.
        """
        assert self.keys is not None
        assert self.values is not None
        batch, heads, tokens, dim = key_states.shape
        if tokens > 1:
            target = slice(self.cache.length, self.cache.length + tokens)
            self.keys[:, :, target] = key_states
            self.values[:, :, target] = value_states
        else:
            _store[(heads, batch)](
                key_states.contiguous(), value_states.contiguous(), self.keys, self.values,
                self.cache.lengths, self.keys.shape[2], heads, dim,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1


class StaticCache(Cache):
    """A BF16 cache of fixed capacity for decoding inside a CUDA graph.

    Args:
        config: of a model with the same heads in every layer.
        batch: sequences, of equal length.
        capacity: tokens of each.
    """

    served: ClassVar[StaticCache]
    """A weak proxy of the cache that `serve` was called on last."""

    def __init__(
        self,
        config: PreTrainedConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        self.length = 0
        """Tokens of each sequence, as the host knows them."""
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        """The same on the device, int32 ``[B]``."""
        self.heads = config.num_attention_heads
        self.kernel: SplitK | None = None
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        super().__init__([StaticLayer(self, shape) for _ in range(config.num_hidden_layers)])

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new states of one layer: prompts from the host, steps from the device."""
        if layer_idx == 0 and key_states.shape[2] == 1:
            self.lengths += 1
        held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1 and not _capturing(self.lengths):
            self.length += key_states.shape[2]
        return held

    def advance(self, tokens: int) -> None:
        """What a replayed graph did on the device, repeated on the host."""
        self.length += tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest ``-tokens_to_remove`` tokens."""
        self.length += int(tokens_to_remove)
        self.lengths.fill_(self.length)

    @property
    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer."""
        return [(layer.keys, layer.values) for layer in self.layers]  # pyright: ignore

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes for states in self.states for part in states)

    def serve(self, model: PreTrainedModel) -> None:
        """Tunes the kernel for this cache as it is filled, and lets ``model`` attend with it."""
        self.lengths.fill_(self.length)
        keys, _ = self.states[0]
        batch, kv_heads, _, dim = keys.shape
        query = torch.randn(batch, self.heads, 1, dim, dtype=self.dtype, device=keys.device)
        cold = self.states[: copies_for(2 * keys.nbytes)]
        launch = baselines.tuned(query, cold, self.lengths)
        self.kernel = SplitK(batch, self.heads, kv_heads, dim, launch, keys.device)
        StaticCache.served = weakref.proxy(self)
        model.set_attn_implementation(ATTENTION)

    def attend(self, query: Tensor, layer_idx: int, scaling: float | None = None) -> Tensor:
        """Attention ``[B, Hq, 1, D]`` over what one layer holds."""
        assert self.kernel is not None, "serve() comes first"
        return self.kernel(query, *self.states[layer_idx], self.lengths, scaling)


@untraced
def _attention(
    module: Any, query: Tensor, *states: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """One function for all caches: a model that is compiled would be compiled again for another."""
    return StaticCache.served.attend(query, module.layer_idx, scaling).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@triton.jit(do_not_specialize=["capacity"])
def _store(
    new_keys, new_values, keys, values, lengths, capacity, heads: tl.constexpr, dim: tl.constexpr
):
    """Writes the newest token of one head of one sequence."""
    head, row = tl.program_id(0), tl.program_id(1)
    source = (row * heads + head) * dim + tl.arange(0, dim)
    position = tl.load(lengths + row) - 1
    target = ((row * heads + head).to(tl.int64) * capacity + position) * dim + tl.arange(0, dim)
    tl.store(keys + target, tl.load(new_keys + source))
    tl.store(values + target, tl.load(new_values + source))
