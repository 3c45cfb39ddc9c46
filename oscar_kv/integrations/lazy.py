"""Cached states that look like full keys or values but stay packed until somebody computes on them.

A Transformers attention function receives tensors, never the cache. ``OscarCache`` hands it
:class:`LazyStates`: the ``"oscar"`` attention function takes the packed pages out of it, and any
other operation sees the dequantized states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from oscar_kv.integrations.compile import untraced
from oscar_kv.storage.ownership import outside_inference_mode
from oscar_kv.storage.packed import PackedKV


@dataclass(frozen=True)
class AttentionView:
    """What one forward pass of one layer attends over.

    Attributes:
        packed: all tokens, the new ones included.
        new_keys: exact keys ``[B, H, Tq, D]`` of the new tokens, where some of them are already
            quantized in ``packed``.
        new_values: their values.
        starts: int ``[B]``, first visible token of each sequence, where no mask tells.
        padding: tokens of left padding that come before what ``packed`` holds of each sequence.
        shift: the same on the device, ``[B]``, if there is any padding.
        sinks: first tokens kept in full precision that are not yet known to be no left padding.
        dtypes: of keys and values as others see them; that of ``packed`` if omitted.
        sources: what a gradient would have to reach; none comes through.
    """

    packed: PackedKV
    new_keys: Tensor | None = None
    new_values: Tensor | None = None
    starts: Tensor | None = None
    padding: Sequence[int] = ()
    shift: Tensor | None = None
    sinks: int = 0
    dtypes: tuple[torch.dtype, torch.dtype] | None = None
    sources: tuple[Tensor, ...] = ()
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", self.packed.lengths)

    def require_current(self) -> None:
        """Raises RuntimeError if the cache has changed since: these states are gone."""
        if self.lengths != self.packed.lengths:
            raise RuntimeError(
                f"the cache held {self.lengths} tokens when it returned these states and holds "
                f"{self.packed.lengths} now: use them before the next update"
            )

    @property
    def length(self) -> int:
        """Tokens of every sequence, left padding included."""
        return max(map(sum, zip(self.lengths, self.padding))) if self.padding else max(self.lengths)

    def mask_of_held(self, mask: Tensor) -> Tensor:
        """What a mask ``[B or 1, Hq or 1, Tq, T]`` of all tokens says of those in ``packed``."""
        if self.shift is None:
            return mask
        moved = torch.arange(self.packed.max_length, device=mask.device) + self.shift[:, None]
        moved = moved.clamp_max(mask.shape[-1] - 1)[:, None, None]  # beyond a shorter sequence
        shape = len(self.padding), *mask.shape[1:3], -1
        return mask.expand(*shape).gather(-1, moved.expand(*shape))

    def dtype(self, part: int) -> torch.dtype:
        """Of the keys (0) or the values (1)."""
        return self.packed.dtype if self.dtypes is None else self.dtypes[part]

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Dequantized keys ``[B, H, T, D]`` and values ``[B, H, T, E]``, new tokens exact."""
        self.require_current()
        with outside_inference_mode():
            dense = []
            for part, states in enumerate(self.packed.dense()):
                if self.shift is not None:
                    states = self._behind_padding(states)
                if (new := (self.new_keys, self.new_values)[part]) is not None:
                    states[:, :, -new.shape[2] :] = new.detach()
                dense.append(refuse_gradients(states.to(self.dtype(part)), self.sources))
        return dense[0], dense[1]

    def _behind_padding(self, held: Tensor) -> Tensor:
        batch, heads, _, channels = held.shape
        states = held.new_zeros(batch, heads, self.length, channels)
        for row, (length, lost) in enumerate(zip(self.lengths, self.padding)):
            states[row, :, lost : lost + length] = held[row, :, :length]
        return states


class LazyStates(Tensor):
    """The keys or the values of an :class:`AttentionView`, dequantized on first use.

    Any torch function takes it and returns plain tensors. It is read only: what it stands for is
    computed from pages, and a change would be lost.
    """

    view_of: AttentionView
    part: int

    @staticmethod
    def __new__(cls, view: AttentionView, part: int) -> LazyStates:
        packed = view.packed
        channels = (packed.layout.head_dim, packed.layout.value_dim)[part]
        shape = (packed.batch_size, packed.layout.num_kv_heads, view.length, channels)
        lazy = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, shape, dtype=view.dtype(part), device=packed.device
        )
        lazy.view_of, lazy.part = view, part
        return lazy

    @classmethod
    def pair(cls, view: AttentionView) -> tuple[LazyStates, LazyStates]:
        """Keys and values of ``view``."""
        return cls(view, 0), cls(view, 1)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"LazyStates({('keys', 'values')[self.part]}, shape={tuple(self.shape)})"

    @untraced
    def plain(self) -> Tensor:
        """The dequantized states, shared by all who ask."""
        return self.view_of.dense[self.part]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Before the dispatcher: storage, DLPack and inference mode go around what comes after it.
        if func in _OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _on_plain(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_plain(func, args, kwargs or {})


_OF_THE_SHAPE = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "is_cuda")
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.__len__,
    torch.numel,
    torch.is_floating_point,
}
"""What is known of states without dequantizing them."""


def _on_plain(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls ``func`` with plain tensors in place of :class:`LazyStates`.

    Raises:
        RuntimeError: if it has written to one.
    """
    lazy = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyStates)]
    plain = [x.plain() for x in lazy]
    versions = [x._version for x in plain]
    args, kwargs = tree_map_only(LazyStates, LazyStates.plain, (args, kwargs))
    result = func(*args, **kwargs)
    if any(x._version != version for x, version in zip(plain, versions)):
        raise RuntimeError(
            "keys and values of a quantized cache are computed from its pages, so writing to them "
            "would change nothing: clone() them, and write to that"
        )
    return result


# -- gradients -------------------------------------------------------------------------------


class _NoGradient(torch.autograd.Function):
    """Hands states on; a gradient that comes back is refused."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, *sources: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "no gradient flows through a quantized cache that holds earlier tokens: pass the whole "
            "sequence at once, or use a DynamicCache, where gradients are needed"
        )


def learning(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Those that a gradient would have to reach."""
    if not torch.is_grad_enabled():
        return ()
    return tuple(tensor for tensor in tensors if tensor.requires_grad)


def refuse_gradients(states: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
    """``states``, which were computed from ``sources`` in ways that have no gradient."""
    return _NoGradient.apply(states, *sources) if sources else states  # pyright: ignore
