"""What happens to rows before and after attention, in plain torch: see :class:`RowOperations`."""

from __future__ import annotations

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.integrations.vllm.rows import Ring, Rows


def locate(rows: Rows, query_begins: Tensor, lengths: Tensor, block_table: Tensor) -> None:
    """See :meth:`RowOperations.locate`."""
    requests = rows.requests.long()
    length, begin = lengths.long()[requests], query_begins.long()[requests]
    first = length - query_begins.long()[requests + 1] + begin  # position of the first new token
    block = first.div(PAGE_TOKENS, rounding_mode="floor") + rows.blocks
    start = block * PAGE_TOKENS
    end = torch.minimum(length, start + PAGE_TOKENS)
    exists = end > torch.maximum(first, start)
    full = exists & (end == start + PAGE_TOKENS)
    own_page = block_table[requests, block.clamp_max(block_table.shape[1] - 1)]
    for target, numbers in (
        (rows.page_counts, torch.where(exists, block, 0)),
        (rows.tail_lengths, torch.where(exists, end - start, 0)),
        (rows.old_lengths, torch.where(exists, (first - start).clamp_min(0), 0)),
        (rows.first_tokens, torch.where(exists, begin + start - first, 0)),
        (rows.lengths, torch.where(exists, length, 0)),
        (rows.complete_pages, torch.where(full, own_page, -1)),
    ):
        target.copy_(numbers)
    table = block_table[requests]
    # Entries that are not read must not be pages of garbage: the reference backend weights them
    # with zero, and zero times NaN is not zero. The first page of the longest row will do.
    safe = table[rows.page_counts.argmax(), 0]
    read = torch.arange(table.shape[1], device=table.device) < rows.page_counts[:, None]
    rows.block_table.copy_(torch.where(read, table, safe))


def open_rows(
    rows: Rows, query: Tensor, keys: Tensor, values: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`RowOperations.open_rows`."""
    device, head_dim = keys.device, keys.shape[2]
    slots = torch.arange(PAGE_TOKENS, device=device)
    tails, olds, firsts = (
        x.long()[:, None] for x in (rows.tail_lengths, rows.old_lengths, rows.first_tokens)
    )
    # Slots that are not in use repeat a token: they have to be finite.
    tokens = (firsts + torch.maximum(torch.minimum(slots, tails - 1), olds)).clamp(0, len(keys) - 1)
    is_old, is_new = slots < olds, (slots >= olds) & (slots < tails)
    positions = PAGE_TOKENS * rows.page_counts.long()[:, None] + slots
    columns = positions // ring.block_tokens % ring.blocks
    places = ring.table.long()[rows.requests.long()[:, None], columns]
    offsets = positions % ring.block_tokens
    old = ring.data[places, :, offsets]  # [V, 128, H, D + E]
    states = torch.where(is_old[..., None, None], old, torch.cat([keys, values], -1)[tokens])
    # Block 0 belongs to nobody: it takes what is not stored.
    is_stored = is_new & (positions >= rows.lengths.long()[:, None] - ring.tokens)
    ring.data[torch.where(is_stored, places, 0), :, offsets] = states
    newest = torch.arange(-rows.num_queries, 0, device=device) + tails
    asked = (firsts + torch.maximum(newest, olds)).clamp(0, len(keys) - 1)
    tail_keys, tail_values = states.transpose(1, 2).split(
        (head_dim, states.shape[-1] - head_dim), -1
    )
    return query[asked].transpose(1, 2), tail_keys, tail_values


def close_rows(rows: Rows, result: Tensor, output: Tensor) -> None:
    """See :meth:`RowOperations.close_rows`."""
    slots = torch.arange(-rows.num_queries, 0, device=result.device) + rows.tail_lengths[:, None]
    is_new = slots >= rows.old_lengths[:, None]
    tokens = rows.first_tokens[:, None] + slots
    output[tokens[is_new].long()] = result.transpose(1, 2)[is_new]
