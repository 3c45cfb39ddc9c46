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
from oscar_kv.storage.checks import zero_nonfinite
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
        starts: tokens of left padding of each sequence, which are not stored.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        config: OscarConfig,
        max_tokens: int | None = None,
        staging: StagingByDevice | None = None,
        starts: list[int] | None = None,
    ) -> None:
        # not super().__init__(): it would set keys and values, which are computed here
        self.is_initialized = False
        self.config = config
        self.max_tokens = max_tokens
        self.staging = staging
        self.starts = starts or []
        self.packed: PackedKV | None = None
        self.padding: list[int] = []
        """Tokens of left padding that each sequence was given and does not hold."""
        self._starts: list[int] = []
        """Left padding of each sequence, whether it has come yet or not."""
        self._shift: Tensor | None = None
        """``padding`` on the device, if there is any."""
        self.visible_from: Tensor | None = None
        """int32 ``[B]``: first visible tokens of those it holds, for steps without a mask."""
        self._unseen_sinks = 0
        """Tokens kept in full precision that no mask was compared with yet: they may be padding."""

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All keys, dequantized once they are used; ``None`` in an empty layer."""
        return None if self.packed is None else LazyStates(self._view(self.packed), 0)

    @keys.setter
    def keys(self, states: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AttributeError(_NOT_STORED)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All values, dequantized once they are used; ``None`` in an empty layer."""
        return None if self.packed is None else LazyStates(self._view(self.packed), 1)

    @values.setter
    def values(self, states: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AttributeError(_NOT_STORED)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _require_four_dimensions(key_states, value_states)
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
        _require_four_dimensions(*given)
        before = self.get_seq_length()
        packed = self._widened(*given) if before else self._empty(*given)
        states = key_states.to(packed.dtype), value_states.to(packed.dtype)
        skipped = self._padding_among(key_states, before)
        stored = _append_real(packed, *states, skipped) if any(skipped) else append(packed, *states)
        self.adopt(packed, [a + b for a, b in zip(self.padding, skipped)] if before else skipped)
        sources = learning(*given)
        if not before:
            self._unseen_sinks = 0 if self.starts else packed.config.sink_tokens
            # Only tokens that hold NaN or Inf are not stored as they are.
            if all(one is other for one, other in zip(states, stored)):
                return given
            keys, values = (refuse_gradients(x.to(y.dtype), sources) for x, y in zip(stored, given))
            return keys, values
        in_tail = key_states.shape[2] - min(skipped) <= packed.fewest_tail_tokens
        new = (None, None) if in_tail or any(skipped) else stored
        dtypes = key_states.dtype, value_states.dtype
        view = self._view(packed, *new, dtypes=dtypes, sources=sources, sinks=self._unseen_sinks)
        self._unseen_sinks = 0
        return LazyStates.pair(view)

    def _view(self, packed: PackedKV, *new: Tensor | None, **more: Any) -> AttentionView:
        padding = {"padding": self.padding, "shift": self._shift}
        return AttentionView(packed, *new, starts=self.visible_from, **padding, **more)

    def _padding_among(self, states: Tensor, before: int) -> list[int]:
        """How many of the new tokens of each sequence are left padding."""
        batch, _, new, _ = states.shape
        if not before:
            starts = self._starts if any(self._starts) else self.starts or [0]
            if batch % len(starts):
                raise ValueError(f"starts={starts}: expected one for each of {batch} sequences")
            # Beam search, for one, repeats every prompt before a cache sees it.
            self._starts = [start for start in starts for _ in range(batch // len(starts))]
        return [min(max(start - before, 0), new) for start in self._starts]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        if self.packed is None:
            return 0
        return max(length + lost for length, lost in zip(self.packed.lengths, self.padding))

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Nothing is left to do: offloaded pages are copied to the CPU as they are written."""

    def prefetch(self) -> None:
        """Begins to bring offloaded pages to the device, if they are not there."""
        if self.packed is not None:
            self.packed.pool.prefetch()

    def reset(self) -> None:
        self.packed, self.is_initialized = None, False
        self.padding, self._shift, self._starts, self.visible_from = [], None, [], None

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
        if self.packed is None or not tokens_to_remove:
            return
        length = self.get_seq_length() + tokens_to_remove
        if length < 0:
            raise ValueError(f"crop({tokens_to_remove}): there are {self.get_seq_length()} tokens")
        padding = [min(lost, length) for lost in self.padding]
        self.packed.crop([length - lost for lost in padding])
        self._set_padding(padding)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"batch_repeat_interleave({repeats!r}): expected a positive integer")
        self._select([row for row in range(len(self.padding)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.packed is not None:
            self._select(torch.arange(len(self.padding))[indices.cpu()].tolist())

    def _select(self, rows: list[int]) -> None:
        if self.packed is not None:
            self.packed.select(rows)
            self._set_padding([self.padding[row] for row in rows])
            self._starts = [self._starts[row] for row in rows]
            if self.visible_from is not None:
                self.visible_from = self.visible_from[rows]

    def _empty(self, key_states: Tensor, value_states: Tensor) -> PackedKV:
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

    def adopt(self, packed: PackedKV, padding: list[int] | None = None) -> None:
        """Makes ``packed`` what this layer holds, and its config that of the layer.

        Args:
            padding: tokens of left padding of each sequence that are not in it; none if omitted.
        """
        self.packed, self.config, self.is_initialized = packed, packed.config, True
        self.dtype, self.device = packed.dtype, packed.device
        self._set_padding([0] * packed.batch_size if padding is None else padding)
        self._starts = self._starts or self.padding

    def _set_padding(self, padding: list[int]) -> None:
        if padding != self.padding:  # else nothing has to go to the device
            self.padding = padding
            self._shift = torch.tensor(padding, device=self.device) if any(padding) else None


def _append_real(
    packed: PackedKV, keys: Tensor, values: Tensor, skipped: list[int]
) -> tuple[Tensor, Tensor]:
    """Appends what follows the first ``skipped`` new tokens of each sequence; returns all, as
    :meth:`PackedKV.append` does."""
    rolled = (
        torch.stack([one.roll(-skip, 1) for one, skip in zip(states, skipped)])
        for states in (keys.detach(), values.detach())
    )
    append(packed, *rolled, lengths=[keys.shape[2] - skip for skip in skipped])
    return (keys, values) if packed.config.check_finite else zero_nonfinite(keys, values)


def _require_four_dimensions(keys: Tensor, values: Tensor) -> None:
    for name, states in (("keys", keys), ("values", values)):
        if states.ndim != 4:
            raise ValueError(f"{name} of shape {tuple(states.shape)}: expected [B, H, T, channels]")


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
