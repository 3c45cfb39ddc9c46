"""``OscarLayer``: the quantized cache of one layer, in place of the one Transformers gives it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from oscar_kv.config import OscarConfig
from oscar_kv.integrations.lazy import AttentionView, LazyStates, learning, refuse_gradients
from oscar_kv.kernels import append
from oscar_kv.storage.offload import StagingByDevice
from oscar_kv.storage.packed import PackedKV

_NOT_STORED = (
    "the keys and values of a quantized layer are computed when they are read and cannot be "
    "assigned: take tokens or sequences out with crop() or batch_select_indices() of the cache"
)


class OscarLayer(CacheLayerMixin):
    """The quantized cache of one full-attention layer, on the device of the first states it gets.

    Args:
        config: what is quantized and how.
        max_tokens: makes room for sequences of this length up front.
        staging: what offloaded pages come to; pages stay on the device if omitted.
    """

    is_sliding = False

    def __init__(
        self,
        config: OscarConfig,
        max_tokens: int | None = None,
        staging: StagingByDevice | None = None,
    ) -> None:
        # not super().__init__(): it would set keys and values, which are computed here
        self.is_initialized = False
        self.config = config
        self.max_tokens = max_tokens
        self.staging = staging
        self.packed: PackedKV | None = None
        self.starts: Tensor | None = None
        """int32 ``[B]``: first visible positions, for steps without a mask."""

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All keys, dequantized once they are used; ``None`` in an empty layer."""
        return None if self.packed is None else LazyStates(AttentionView(self.packed), 0)

    @keys.setter
    def keys(self, states: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AttributeError(_NOT_STORED)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All values, dequantized once they are used; ``None`` in an empty layer."""
        return None if self.packed is None else LazyStates(AttentionView(self.packed), 1)

    @values.setter
    def values(self, states: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AttributeError(_NOT_STORED)

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a rollback of a few tokens leaves no trace: it then stays within the tail."""
        return self.config.recent_tokens > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.adopt(self._empty(key_states, value_states))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states ``[B, H, T, channels]`` and returns what the model attends over.

        The first call returns the states themselves: a prompt attends over its exact self, and
        gradients flow. Later ones return all states, in the dtypes of the new ones, and refuse
        gradients. The layer holds the widest dtype that it was given.

        Raises:
            ValueError, TypeError: as :meth:`PackedKV.append`.
        """
        given = key_states, value_states
        first = self.packed is None or self.packed.max_length == 0
        packed = self._empty(*given) if first else self._widened(*given)
        states = [one.to(packed.dtype) for one in given]
        stored = append(packed, *states)
        self.adopt(packed)
        sources = learning(*given)
        if first:
            # Only tokens that hold NaN or Inf are not stored as they are.
            if all(one is other for one, other in zip(states, stored)):
                return given
            keys, values = (refuse_gradients(x.to(y.dtype), sources) for x, y in zip(stored, given))
            return keys, values
        in_tail = key_states.shape[2] <= packed.fewest_tail_tokens
        new = (None, None) if in_tail else stored
        dtypes = key_states.dtype, value_states.dtype
        return LazyStates.pair(AttentionView(packed, *new, self.starts, dtypes, sources))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.packed is None else self.packed.max_length

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Nothing is left to do: offloaded pages are copied to the CPU as they are written."""

    def prefetch(self) -> None:
        """Begins to bring offloaded pages to the device, if they are not there."""
        if self.packed is not None:
            self.packed.pool.prefetch()

    def reset(self) -> None:
        self.packed, self.is_initialized, self.starts = None, False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest ``-tokens_to_remove`` tokens; see :meth:`PackedKV.crop`.

        Raises:
            ValueError: for a positive number, or more tokens than there are.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted generation may pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): expected a negative number of tokens to remove"
            )
        if self.packed is not None and tokens_to_remove:
            lengths = self.packed.lengths
            if -tokens_to_remove > min(lengths):
                raise ValueError(f"crop({tokens_to_remove}): there are {min(lengths)} tokens")
            self.packed.crop([length + tokens_to_remove for length in lengths])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.packed is not None:
            self.packed.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"batch_repeat_interleave({repeats!r}): expected a positive integer")
        if self.packed is not None:
            rows = range(self.packed.batch_size)
            self.packed.select([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.packed is not None:
            rows = torch.arange(self.packed.batch_size)
            self.packed.select(rows[indices.cpu()].tolist())

    def _empty(self, key_states: Tensor, value_states: Tensor) -> PackedKV:
        for name, states in (("keys", key_states), ("values", value_states)):
            if states.ndim != 4:
                raise ValueError(
                    f"{name} of shape {tuple(states.shape)}: expected [B, H, T, channels]"
                )
        batch, heads, _, head_dim = key_states.shape
        value_dim = value_states.shape[3]
        return PackedKV(
            self.config,
            batch_size=batch,
            num_kv_heads=heads,
            head_dim=head_dim,
            value_head_dim=None if value_dim == head_dim else value_dim,
            dtype=_widest(key_states, value_states),
            device=key_states.device,
            max_tokens=self.max_tokens,
            staging=None if self.staging is None else self.staging[key_states.device],
        )

    def _widened(self, key_states: Tensor, value_states: Tensor) -> PackedKV:
        """What this layer holds, once it can hold these states without rounding them."""
        assert self.packed is not None
        self.packed.widen(_widest(self.packed.tail_keys, key_states, value_states))
        return self.packed

    def adopt(self, packed: PackedKV) -> None:
        """Makes ``packed`` what this layer holds, and its config that of the layer."""
        self.packed, self.config, self.is_initialized = packed, packed.config, True
        self.dtype, self.device = packed.dtype, packed.device


def _widest(*states: Tensor) -> torch.dtype:
    """The dtype that holds all of these without rounding them.

    Raises:
        TypeError: for something else than floating point.
    """
    for one in states:
        if not one.is_floating_point():
            raise TypeError(f"keys or values are {one.dtype}: expected floating point")
    return functools.reduce(torch.promote_types, (one.dtype for one in states))


def layer_memory(layer: Any) -> dict[str, int]:
    """Bytes that one layer of any cache has allocated, by kind as in :meth:`OscarCache.memory`."""
    if isinstance(layer, OscarLayer):
        return {} if layer.packed is None else layer.packed.memory()
    states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for group in ("conv_states", "recurrent_states"):
        states += getattr(layer, group, {}).values()
    return {"other": sum(t.nbytes for t in states if isinstance(t, Tensor))}


def holds_states(layer: Any) -> bool:
    """Whether one layer of any cache has been given anything."""
    return any(layer_memory(layer).values()) or getattr(layer, "cumulative_length", 0) > 0


def drop_graph(layer: Any) -> None:
    """Lets go of the graph that the states of one of Transformers' layers came from: a cache that
    keeps it grows with every pass, and cannot be copied."""
    for name in ("keys", "values"):
        states = getattr(layer, name, None)
        if isinstance(states, Tensor) and states.requires_grad:
            setattr(layer, name, states.detach())
    for name in ("conv_states", "recurrent_states"):
        kept = getattr(layer, name, {})
        for index, states in kept.items():
            if isinstance(states, Tensor) and states.requires_grad:
                kept[index] = states.detach()
