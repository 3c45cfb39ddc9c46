"""One layer of one step over an engine's pages: store the new tokens, then attend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oscar_kv import kernels
from oscar_kv.integrations.vllm.rows import Rows
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.paged import PagedSequences


def attend_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    ring: Tensor,
    rows: Sequence[Rows],
    output: Tensor,
    *,
    layout: PageLayout,
    most_pages: int,
    scaling: float,
    softcap: float | None = None,
) -> None:
    """Stores a step's new tokens in ring and pages, and writes what they attend to.

    Args:
        query: ``[N, Hq, D]`` of the batch's new tokens, after RoPE.
        keys: ``[N, H, D]``.
        values: ``[N, H, E]``.
        pages: uint8 ``[capacity, H, page_bytes]``.
        ring: ``[capacity, H, block_tokens, D + E]`` in the model's dtype: key and value.
        rows: the step, see :func:`~oscar_kv.integrations.vllm.rows.locate`.
        output: ``[N, Hq, E]``, written.
        layout: of the pages.
        most_pages: no request has more.
        scaling, softcap: as in :func:`oscar_kv.kernels.extend_attention`.
    """
    states = [
        tuple(
            _own_blocks(new, old, part)
            for new, old in zip((keys, values), ring.split((layout.head_dim, layout.value_dim), -1))
        )
        for part in rows
    ]
    # All is written before anything is read: a request may share pages that another one completes.
    for part, (tail_keys, tail_values) in zip(rows, states):
        tokens = part.group.tokens
        new = torch.cat([keys[tokens], values[tokens]], -1)
        ring[part.store_blocks, :, part.store_offsets] = new
        kernels.pack_into(pages, part.complete_pages, tail_keys, tail_values, layout)
    for part, (tail_keys, tail_values) in zip(rows, states):
        sequences = PagedSequences(
            layout,
            pages,
            part.block_table,
            part.page_counts,
            tail_keys,
            tail_values,
            part.tail_lengths,
            most_pages,
        )
        result = kernels.attend_paged(
            query[part.query_tokens].transpose(1, 2),
            sequences,
            scaling=scaling,
            softcap=softcap,
        )
        output[part.group.tokens] = result[part.result_rows, :, part.result_queries]


def _own_blocks(new: Tensor, ring: Tensor, rows: Rows) -> Tensor:
    """The exact states of every row's block, ``[V, H, 128, channels]``; unused slots repeat one.

    Args:
        new: ``[N, H, channels]``.
        ring: ``[capacity, H, block_tokens, channels]``.
    """
    heads = torch.arange(ring.shape[1], device=ring.device)[:, None]
    old = ring[rows.ring_blocks[:, None], heads].flatten(2, 3)
    fresh = new[rows.slot_tokens].transpose(1, 2)
    return torch.where(rows.slot_is_old[:, None, :, None], old, fresh)
