"""A step of the scheduler as rows: one for every block of 128 positions that a request writes to.

A query reads all earlier blocks of its request packed and its own block exactly. Whatever the
scheduler does - chunks of a prompt, prefix hits, preemption, rejected drafts - a token thus
sees the same states, and the answer to a request does not depend on the requests beside it.

For the kernels a row is a sequence of its own: whole pages, then a tail of up to 128 exact tokens,
of which the newest are queries. The host knows only how many tokens each request computes; where
these lie is worked out on the device, once per step, so that nothing waits for it. A step that is
replayed as a CUDA graph finds its rows where they were when it was captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.kernels import DECODE_QUERIES

QUERY_SLOTS = (1, 4, DECODE_QUERIES, 32, 64, PAGE_TOKENS)
"""How many queries a row may have room for. Kernels are compiled for each; and the more there are,
the less memory do short prompts waste."""


@dataclass(frozen=True)
class Rows:
    """``V`` rows that are attended together, of up to ``num_queries`` queries.

    The row's block has slots 0 .. 127: tokens from earlier steps, then new ones, then nothing. A
    row without new tokens is empty: all its numbers are 0, and its page -1.
    """

    num_queries: int
    """Query slots of every row: its new tokens come last."""
    requests: Tensor
    """int32 ``[V]``: the request of each row, its place in the batch."""
    blocks: Tensor
    """int32 ``[V]``: blocks between that of the request's first new token and the row's."""
    page_counts: Tensor
    """int32 ``[V]``: whole pages before the row's block."""
    tail_lengths: Tensor
    """int32 ``[V]``: slots in use."""
    old_lengths: Tensor
    """int32 ``[V]``: those of tokens from earlier steps, which lie in the ring."""
    first_tokens: Tensor
    """int32 ``[V]``: new token ``s`` of the block is number ``first_tokens + s`` of the batch."""
    lengths: Tensor
    """int32 ``[V]``: tokens of the request, the new ones included."""
    complete_pages: Tensor
    """int32 ``[V]``: the page that the row's block becomes in this step, -1 if it is not full."""
    sink_lengths: Tensor
    """int32 ``[V]``: zeros."""
    block_table: Tensor
    """int32 ``[V, width]``, as :class:`~oscar_kv.storage.paged.PagedSequences` asks for it."""
    in_order: bool = False
    """Row ``v`` is request ``v``, and place ``v`` in the batch is that of its only new token, if it
    has one."""

    @staticmethod
    def of(num_queries: int, requests: Tensor, blocks: Tensor, width: int) -> Rows:
        """Rows of these requests and blocks that are still to be located; width of the table."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros((len(requests), *shape), dtype=torch.int32, device=requests.device)

        numbers = (zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros())
        return Rows(num_queries, requests, blocks, *numbers, zeros(width))

    def first(self, count: int, num_queries: int, *, in_order: bool) -> Rows:
        """The first ``count`` of these rows, in the same memory."""
        tensors = {name: x[:count] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, num_queries=num_queries, in_order=in_order, **tensors)


def most_blocks(new_tokens: int) -> int:
    """How many blocks so many new tokens of a request may touch, wherever they begin."""
    return (new_tokens + PAGE_TOKENS - 2) // PAGE_TOKENS + 1


def query_slots(new_tokens: int) -> int:
    """Query slots of the rows of a request that computes so many tokens."""
    return next((slots for slots in QUERY_SLOTS if slots >= new_tokens), PAGE_TOKENS)


def group_rows(query_lengths: Sequence[int], width: int, device: torch.device) -> list[Rows]:
    """The rows of a step: requests with as many query slots together.

    A request has a row for each block that it might touch, which is one more than it does touch
    where the first is barely begun; that row stays empty.

    Args:
        query_lengths: how many tokens each request of the batch computes.
        width: of the block table.
        device: where the step runs.
    """
    groups = []
    for slots in QUERY_SLOTS:
        blocks = [
            (request, block)
            for request, length in enumerate(query_lengths)
            if length and query_slots(length) == slots
            for block in range(most_blocks(length))
        ]
        if blocks:
            placed = torch.tensor(blocks, dtype=torch.int32).T.contiguous()
            requests, offsets = placed.to(device, non_blocking=True)
            groups.append(Rows.of(slots, requests, offsets, width))
    return groups


class DecodeRows:
    """Rows of steps in which every request computes few tokens: always in the same memory.

    Args:
        most_requests: of a step.
        most_queries: tokens that a request computes, at most.
        width: of the block table.
    """

    def __init__(
        self, most_requests: int, most_queries: int, width: int, device: torch.device
    ) -> None:
        self.most_requests, self.most_queries = most_requests, most_queries
        self._rows: dict[int, Rows] = {}
        for blocks in range(1, 1 + most_blocks(most_queries)):
            row = torch.arange(most_requests * blocks, dtype=torch.int32, device=device)
            self._rows[blocks] = Rows.of(most_queries, row // blocks, row % blocks, width)

    def of(self, query_lengths: Sequence[int], num_tokens: int) -> Rows | None:
        """The rows of a step, ``None`` if it is not such a one.

        Requests without new tokens, with which an engine fills up a batch, have rows, too: what
        follows depends on how many requests there are, and on the most tokens of one.

        Args:
            query_lengths: how many tokens each request of the batch computes.
            num_tokens: places for tokens in the batch, whether they are filled or not.
        """
        most, requests = max(query_lengths, default=0), len(query_lengths)
        if requests > self.most_requests or not 1 <= most <= self.most_queries:
            return None
        blocks = most_blocks(most)
        begins_with_ones = most == 1 and 0 not in query_lengths[: sum(query_lengths)]
        in_order = begins_with_ones and requests <= num_tokens
        rows = self._rows[blocks]
        return rows.first(requests * blocks, query_slots(most), in_order=in_order)


@dataclass(frozen=True)
class Ring:
    """Where the newest tokens of every request lie exactly: its blocks, used in turn.

    Token ``p`` of a request is in block ``table[request, p // block_tokens % blocks]`` at
    ``p % block_tokens``.
    """

    data: Tensor
    """``[capacity, H, block_tokens, D + E]`` in the model's dtype: key and value."""
    table: Tensor
    """int32 ``[requests, >= blocks]``."""
    blocks: int

    @property
    def block_tokens(self) -> int:
        """A divisor of 128."""
        return self.data.shape[2]

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_tokens


def ring_shape(page_bytes: int, token_bytes: int, drafts: int = 0) -> tuple[int, int]:
    """How many blocks a ring has, and how many exact tokens each: as many as fit a page's bytes.

    Together they hold a block that is not full yet and, behind it, ``drafts`` that may be rejected.

    Raises:
        ValueError: if a page holds no exact token.
    """
    for block_tokens in (128, 64, 32, 16, 8, 4, 2, 1):
        if block_tokens * token_bytes <= page_bytes:
            return -(-(PAGE_TOKENS + drafts) // block_tokens), block_tokens
    raise ValueError(f"a page of {page_bytes} bytes holds no exact token of {token_bytes} bytes")
