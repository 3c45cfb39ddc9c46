"""What one append will write, worked out before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.sequence import Group

if TYPE_CHECKING:
    from oscar_kv.storage.packed import PackedKV


class PackFunction(Protocol):
    """Packs whole pages into a pool, as :func:`oscar_kv.storage.codec.encode_into` does."""

    def __call__(
        self,
        pool: Tensor,
        page_ids: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: PageLayout,
        *,
        pages: int,
    ) -> None: ...


class StepFunction(Protocol):
    """Appends a few tokens on the device; see :meth:`PackedKV.append_step`."""

    def __call__(
        self, packed: PackedKV, keys: Tensor, values: Tensor, counts: Tensor | None
    ) -> None: ...


@dataclass(frozen=True)
class Write:
    """New sinks, pages and tail of one group of sequences."""

    group: Group
    sinks: tuple[Tensor, Tensor]
    whole: tuple[Tensor, Tensor]
    """Keys and values ``[rows, H, T, channels]`` whose first tokens become pages."""
    pages: int
    """Pages that each sequence gains."""
    tail_begin: int
    tail: tuple[Tensor, Tensor]

    @property
    def new_pages(self) -> int:
        """Pages of all sequences of the group together."""
        return self.pages * len(self.group.numbers)


def plan_write(packed: PackedKV, group: Group, keys: Tensor, values: Tensor) -> Write:
    """Splits a group's new tokens into sinks, whole pages and tail."""
    rows, before = group.rows, group.sample
    keys = keys[rows, :, : group.new_tokens]
    values = values[rows, :, : group.new_tokens]
    sinks = min(packed.config.sink_tokens - before.sinks, group.new_tokens)
    sink_states = keys[:, :, :sinks], values[:, :, :sinks]
    whole = keys, values = keys[:, :, sinks:], values[:, :, sinks:]
    complete = max(0, before.tail + keys.shape[2] - packed.config.recent_tokens) // PAGE_TOKENS
    if not complete:
        return Write(group, sink_states, whole, 0, before.tail, whole)
    if before.tail:
        keys = torch.cat([packed.tail_keys[rows, :, : before.tail], keys], 2)
        values = torch.cat([packed.tail_values[rows, :, : before.tail], values], 2)
    end = complete * PAGE_TOKENS
    rest = keys[:, :, end:], values[:, :, end:]
    return Write(group, sink_states, (keys, values), complete, 0, rest)
