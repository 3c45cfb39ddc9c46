"""What one append will write, worked out before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.sequence import Group

if TYPE_CHECKING:
    from oscar_kv.storage.packed import PackedKV

PackFunction = Callable[[Tensor, Tensor, PageLayout], Tensor]


@dataclass(frozen=True)
class Write:
    """New sinks, pages and tail of one group of sequences."""

    group: Group
    sinks: tuple[Tensor, Tensor]
    pages: Tensor | None
    """uint8 ``[rows, new pages, H, page_bytes]``."""
    tail_begin: int
    tail: tuple[Tensor, Tensor]

    @property
    def new_pages(self) -> int:
        """Pages that each sequence of the group gains."""
        return 0 if self.pages is None else self.pages.shape[1]


def plan_write(
    packed: PackedKV, group: Group, keys: Tensor, values: Tensor, pack: PackFunction
) -> Write:
    """Splits a group's new tokens into sinks, whole pages (packed here) and tail."""
    rows, before = group.rows, group.sample
    keys = keys[rows, :, : group.new_tokens]
    values = values[rows, :, : group.new_tokens]
    sinks = min(packed.config.sink_tokens - before.sinks, group.new_tokens)
    sink_states = keys[:, :, :sinks], values[:, :, :sinks]
    keys, values = keys[:, :, sinks:], values[:, :, sinks:]
    complete = max(0, before.tail + keys.shape[2] - packed.config.recent_tokens) // PAGE_TOKENS
    if not complete:
        return Write(group, sink_states, None, before.tail, (keys, values))
    if before.tail:
        keys = torch.cat([packed.tail_keys[rows, :, : before.tail], keys], 2)
        values = torch.cat([packed.tail_values[rows, :, : before.tail], values], 2)
    end = complete * PAGE_TOKENS

    def whole_pages(states: Tensor) -> Tensor:
        pages = states[:, :, :end].unflatten(2, (complete, PAGE_TOKENS))
        return pages.transpose(1, 2).flatten(0, 1)

    pages = pack(whole_pages(keys), whole_pages(values), packed.layout)
    rest = keys[:, :, end:], values[:, :, end:]
    return Write(group, sink_states, pages.unflatten(0, (-1, complete)), 0, rest)
