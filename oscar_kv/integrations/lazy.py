"""Cached states that look like full keys or values but stay packed until somebody computes on them.

A Transformers attention function receives tensors, never the cache. ``OscarCache`` hands it
:class:`LazyStates`: the ``"oscar"`` attention function takes the packed pages out of it, and any
other operation sees the dequantized states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from oscar_kv.integrations.compile import untraced
from oscar_kv.storage.packed import PackedKV


@dataclass(frozen=True)
class AttentionView:
    """What one forward pass of one layer attends over.

    Attributes:
        packed: all tokens, the new ones included.
        new_keys: exact keys ``[B, H, Tq, D]`` of the new tokens, where some of them are already
            quantized in ``packed``.
        new_values: their values.
        starts: int ``[B]``, first visible position of each sequence, where no mask tells.
    """

    packed: PackedKV
    new_keys: Tensor | None = None
    new_values: Tensor | None = None
    starts: Tensor | None = None
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

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Dequantized keys ``[B, H, T, D]`` and values ``[B, H, T, E]``, new tokens exact."""
        self.require_current()
        keys, values = self.packed.dense()
        if self.new_keys is not None and self.new_values is not None:
            keys[:, :, -self.new_keys.shape[2] :] = self.new_keys
            values[:, :, -self.new_values.shape[2] :] = self.new_values
        return keys, values


class LazyStates(Tensor):
    """The keys or the values of an :class:`AttentionView`, dequantized on first use.

    Any torch operation on it works and returns plain tensors.
    """

    view_of: AttentionView
    part: int

    @staticmethod
    def __new__(cls, view: AttentionView, part: int) -> LazyStates:
        packed = view.packed
        channels = (packed.layout.head_dim, packed.layout.value_dim)[part]
        shape = (packed.batch_size, packed.layout.num_kv_heads, packed.max_length, channels)
        lazy = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, shape, dtype=packed.dtype, device=packed.device
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

    # What torch implements outside of its dispatcher:

    def tolist(self) -> Any:
        return self.plain().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.plain().numpy(force=force)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain().clone()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tree_map_only(LazyStates, LazyStates.plain, args)
        kwargs = tree_map_only(LazyStates, LazyStates.plain, kwargs or {})
        return func(*args, **kwargs)
