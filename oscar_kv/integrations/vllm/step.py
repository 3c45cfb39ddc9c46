"""One layer of one step over an engine's pages: store the new tokens, then attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from oscar_kv import kernels
from oscar_kv.integrations.vllm import torch_rows
from oscar_kv.integrations.vllm.rows import Ring, Rows
from oscar_kv.kernels.dispatch import choose
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.paged import PagedSequences


class RowOperations(Protocol):
    """What is done to rows besides packing and attending; in Triton one launch each."""

    def locate(
        self, rows: Rows, query_begins: Tensor, lengths: Tensor, block_table: Tensor
    ) -> None:
        """Works out where ``rows`` lie, and writes it there. Once per step.

        Args:
            query_begins: int32 ``[requests + 1]``, each request's first new token in the batch.
            lengths: int32 ``[requests]``, tokens of each request, the new ones included.
            block_table: int32 ``[requests, width]``, pages of each request.
        """
        ...

    def open_rows(
        self, rows: Rows, query: Tensor, keys: Tensor, values: Tensor, ring: Ring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stores the new tokens in the ring, and collects what rows are attended with.

        Args:
            query: ``[N, Hq, D]`` of the batch's new tokens.
            keys: ``[N, H, D]``.
            values: ``[N, H, E]``.

        Returns:
            Queries ``[V, Hq, num_queries, D]``, and the exact keys ``[V, H, 128, D]`` and values
            ``[V, H, 128, E]`` of each row's block.
        """
        ...

    def close_rows(self, rows: Rows, result: Tensor, output: Tensor) -> None:
        """Writes ``result [V, Hq, num_queries, E]`` of the new tokens to ``output [N, Hq, E]``."""
        ...


def has_kernels(layout: PageLayout, device: torch.device) -> bool:
    """Whether a step on ``device`` needs nothing of the host."""
    return choose(layout, device)[0].name != "reference"


def row_operations(layout: PageLayout, device: torch.device) -> RowOperations:
    """Those that suit the backend that packs and attends."""
    if not has_kernels(layout, device):
        return torch_rows
    from oscar_kv.integrations.vllm import triton_rows

    return triton_rows


def attend_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    ring: Ring,
    groups: Sequence[Rows],
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
        ring: exact tokens.
        groups: the step, located.
        output: ``[N, Hq, E]``, written.
        layout: of the pages.
        most_pages: no request has more.
        scaling, softcap: as in :func:`oscar_kv.kernels.extend_attention`.
    """
    operations = row_operations(layout, pages.device)
    opened = [operations.open_rows(rows, query, keys, values, ring) for rows in groups]
    # All is written before anything is read: a request may share pages that another one completes.
    for rows, (_, tail_keys, tail_values) in zip(groups, opened):
        kernels.pack_into(pages, rows.complete_pages, tail_keys, tail_values, layout)
    for rows, (queries, tail_keys, tail_values) in zip(groups, opened):
        sequences = PagedSequences(
            layout,
            pages,
            rows.block_table,
            rows.page_counts,
            tail_keys,
            tail_values,
            rows.tail_lengths,
            rows.sink_lengths,
            most_pages,
        )
        direct = output[: len(queries)].unsqueeze(2) if rows.in_order else None
        result = kernels.attend_paged(
            queries, sequences, scaling=scaling, softcap=softcap, out=direct
        )
        if not rows.in_order:
            operations.close_rows(rows, result, output)
