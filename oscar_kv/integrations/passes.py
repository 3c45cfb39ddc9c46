"""Which layers a forward pass over a cache has updated, and whether it came to its end.

A model updates each of its layers once in a pass, and nobody tells a cache when a pass begins or
ends. So an update of a layer that the latest pass has already updated begins a new one. The latest
pass was unfinished if it has stopped before layers that hold tokens: which layers a model has is
learnt from what they hold, not from a config, since layers may be cut off, replaced or left out.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor


class Passes:
    """The latest pass over one cache, and what is known of passes over it in general.

    Attributes:
        layers: the layers that passes update, ``None`` before the first one.
    """

    def __init__(self) -> None:
        self.layers: set[int] | None = None
        self._updated: dict[int, int | None] = {}
        """Layers, and how many tokens each held before; ``None`` where a layer counts none."""
        self._lent: dict[tuple[int, str], tuple[Tensor, int]] = {}
        """States that a model was given to update in place, and their versions before."""
        self._kinds: set[tuple[int, str]] = set()
        self._size: tuple[int, int] | None = None
        """Tokens before the latest pass, and new ones, once a layer that counts has them."""
        self._uneven = False
        """Whether layers have grown differently: their lengths then tell nothing of a pass."""
        self._has_mask = self._mask_asked_for = False
        self._thread: weakref.ref[threading.Thread] | None = None

    @property
    def updated(self) -> set[int]:
        """Layers that the latest pass has updated."""
        lent = self._lent.items()
        return self._updated.keys() | {layer for (layer, _), (x, old) in lent if x._version != old}

    @property
    def unfinished(self) -> bool:
        """Whether the latest pass has not reached the last layers."""
        updated = self.updated
        if self._uneven or not updated or self.layers is None:
            return False
        missing = self.layers - updated
        return bool(missing) and max(updated) < min(missing)

    @property
    def length_before(self) -> int | None:
        """Tokens before the latest pass, if any layer that counts them has been updated."""
        return None if self._size is None else self._size[0]

    def held_before(self, layer: int) -> int:
        """Tokens that a layer of the latest pass held before."""
        return self._updated.get(layer) or 0

    def mask_asked_for(self) -> None:
        """Notes that the next pass is told how long all of its layers are."""
        self._mask_asked_for = True

    def begins_anew(self, layer: int, kind: str) -> bool:
        """Whether an update of this ``kind`` begins a new pass."""
        return (layer, kind) in self._kinds

    def record(self, layer: int, kind: str, before: int | None, new: int) -> None:
        """Adds an update to the latest pass.

        Args:
            before: tokens that the layer held, ``None`` if it does not count them.
            new: how many come.

        Raises:
            ValueError: if the layer is not as long as the mask of this pass says.
        """
        if not self._kinds:
            self._has_mask, self._mask_asked_for = self._mask_asked_for, False
        if before is not None:
            self._size = self._size or (before, new)
            if self._has_mask and before != self._size[0]:
                raise ValueError(
                    f"layer {layer} holds {before} tokens, and this forward pass began with "
                    f"{self._size[0]}: an earlier one failed half-way, or left this layer out. "
                    "Call reset() first"
                )
            self._uneven |= self._size != (before, new)
        self._thread = weakref.ref(threading.current_thread())
        self._kinds.add((layer, kind))
        self._updated.setdefault(layer, before)

    def lend(self, layer: int, kind: str, state: Tensor | None) -> None:
        """Notes that the model is given a state, which it may update in place."""
        self._kinds.add((layer, kind))
        if state is not None and not state.is_inference():
            self._lent[layer, kind] = state, state._version

    def end(self, taken_back: bool = False) -> None:
        """The latest pass is over, or was taken back."""
        if self.layers is not None and not taken_back:
            self.layers |= self.updated
        self._updated, self._lent, self._kinds, self._size = {}, {}, set(), None

    def require_not_running(self, cache: Any) -> None:
        """Raises RuntimeError if another thread is in the middle of the latest pass."""
        thread = None if self._thread is None else self._thread()
        if self.updated and thread is not None and _runs_a_pass(thread, cache):
            raise RuntimeError(
                "another thread is in the middle of a forward pass over this cache: give every "
                "thread a cache of its own"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_thread": None,
            "_lent": {},
        }  # of no meaning in a copy or another process


def _runs_a_pass(thread: threading.Thread, cache: Any) -> bool:
    """Whether a module that was given ``cache`` is at work in another ``thread``.

    A thread whose pass has failed may be dead, idle in a pool, or busy with another cache.
    """
    if thread is threading.current_thread() or not thread.is_alive():
        return False
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        found = frame.f_locals
        given = found.get("cache", found.get("past_key_values"))  # before Transformers 5.24
        given = getattr(given, "self_attention_cache", given)
        if given is cache and isinstance(found.get("self"), torch.nn.Module):
            return True
        frame = frame.f_back
    return False
