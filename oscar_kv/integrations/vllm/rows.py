"""A step of the scheduler as rows: one for every block of 128 positions that a request writes to.

A query reads all earlier blocks of its request packed and its own block exactly. Whatever the
scheduler does - chunks of a prompt, prefix hits, preemption, rejected drafts - a token thus
sees the same states, and the answer to a request does not depend on the requests beside it.

For the kernels a row is a sequence of its own: whole pages, then a tail of up to 128 exact tokens,
of which the newest are queries. The host knows only how many tokens each request computes; where
these lie is worked out on the device, so that nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.kernels import DECODE_QUERIES


@dataclass(frozen=True)
class RowGroup:
    """Rows that are attended together: ``V`` rows of up to ``num_queries`` queries.

    A request that computes ``n`` tokens has a row for each block that it might touch, which is one
    more than it does touch where the first is barely begun; that row stays empty.
    """

    num_queries: int
    """Query slots of every row."""
    requests: Tensor
    """int64 ``[V]``: the request of each row, its place in the batch."""
    blocks: Tensor
    """int64 ``[V]``: blocks between that of the request's first new token and the row's."""
    tokens: Tensor
    """int64 ``[N]``: the new tokens of these requests, their places in the batch."""
    token_requests: Tensor
    """int64 ``[N]``: the request of each of them."""
    token_offsets: Tensor
    """int64 ``[N]``: how many new tokens of its request come before it."""
    token_rows: Tensor
    """int64 ``[N]``: the first row of its request."""


def group_rows(query_lengths: Sequence[int], device: torch.device) -> list[RowGroup]:
    """The rows of a step: requests with few new tokens in one group, prompts in another.

    Args:
        query_lengths: how many tokens each request of the batch computes.
        device: where the step runs.
    """
    begins, total = [], 0
    for length in query_lengths:
        begins.append(total)
        total += length
    few = [r for r, length in enumerate(query_lengths) if 0 < length <= DECODE_QUERIES]
    many = [r for r, length in enumerate(query_lengths) if length > DECODE_QUERIES]
    groups = []
    if few:
        widest = max(query_lengths[r] for r in few)
        groups.append(_group(few, query_lengths, begins, widest, device))
    if many:
        groups.append(_group(many, query_lengths, begins, PAGE_TOKENS, device))
    return groups


def _group(
    members: Sequence[int],
    query_lengths: Sequence[int],
    begins: Sequence[int],
    num_queries: int,
    device: torch.device,
) -> RowGroup:
    requests, blocks = [], []
    tokens, token_requests, token_offsets, token_rows = [], [], [], []
    for request in members:
        length = query_lengths[request]
        tokens += range(begins[request], begins[request] + length)
        token_requests += [request] * length
        token_offsets += range(length)
        token_rows += [len(requests)] * length
        most = (length + PAGE_TOKENS - 2) // PAGE_TOKENS + 1
        requests += [request] * most
        blocks += range(most)

    def on_device(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)

    return RowGroup(
        num_queries,
        on_device(requests),
        on_device(blocks),
        on_device(tokens),
        on_device(token_requests),
        on_device(token_offsets),
        on_device(token_rows),
    )


@dataclass(frozen=True)
class Ring:
    """Where the newest tokens of every request lie exactly: its blocks, used in turn.

    Token ``p`` of a request is in block ``table[request, p // block_tokens % blocks]`` at
    ``p % block_tokens``.
    """

    table: Tensor
    """int ``[requests, >= blocks]``."""
    blocks: int
    block_tokens: int
    """A divisor of 128."""

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_tokens

    def block_of(self, requests: Tensor, positions: Tensor) -> Tensor:
        """Block ids of ``positions`` (any shape) of ``requests`` (broadcastable to it)."""
        column = positions.div(self.block_tokens, rounding_mode="floor") % self.blocks
        return self.table[requests.expand_as(column), column].long()


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


@dataclass(frozen=True)
class Rows:
    """A :class:`RowGroup` with the lengths of its requests: what one step reads and writes."""

    group: RowGroup
    page_counts: Tensor
    """int32 ``[V]``: whole pages before the row's block; 0 for an empty row."""
    tail_lengths: Tensor
    """int32 ``[V]``: exact tokens of the block, the new ones included; 0 for an empty row."""
    block_table: Tensor
    """int32 ``[V, width]``, as :class:`~oscar_kv.storage.paged.PagedSequences` asks for it."""
    complete_pages: Tensor
    """int32 ``[V]``: the page that the row's block becomes in this step, -1 if it is not full."""
    query_tokens: Tensor
    """int64 ``[V, num_queries]``: which new token asks; the newest last, others repeated."""
    slot_tokens: Tensor
    """int64 ``[V, 128]``: the new token at each slot of the block, where it is one."""
    slot_is_old: Tensor
    """bool ``[V, 128]``: slots of tokens from earlier steps, which lie in the ring."""
    ring_blocks: Tensor
    """int64 ``[V, 128 / block_tokens]``: the ring's blocks of the row's block."""
    store_blocks: Tensor
    """int64 ``[N]``: the ring's block in which a new token is stored; 0, which nobody reads, for
    tokens that the rest of the step would overwrite."""
    store_offsets: Tensor
    """int64 ``[N]``: its place in that block."""
    result_rows: Tensor
    """int64 ``[N]``: the row that answers a new token."""
    result_queries: Tensor
    """int64 ``[N]``: its query there."""


def locate(
    group: RowGroup, query_begins: Tensor, lengths: Tensor, block_table: Tensor, ring: Ring
) -> Rows:
    """Works out on the device where the rows of ``group`` lie.

    Args:
        query_begins: int ``[requests + 1]``, the first new token of each request in the batch.
        lengths: int ``[requests]``, tokens of each request, the new ones included.
        block_table: int32 ``[requests, width]``, pages of each request.
        ring: their newest tokens.
    """
    requests, num_queries = group.requests, group.num_queries
    begins, lengths = query_begins.long(), lengths.long()
    firsts = lengths - (begins[1:] - begins[:-1])  # positions of first new tokens
    first, begin, length = firsts[requests], begins[requests], lengths[requests]
    block = first.div(PAGE_TOKENS, rounding_mode="floor") + group.blocks
    start = block * PAGE_TOKENS
    end = torch.minimum(length, start + PAGE_TOKENS)
    exists = end > torch.maximum(first, start)
    tails = torch.where(exists, end - start, 0)
    page_counts = torch.where(exists, block, 0)

    def new_tokens(positions: Tensor) -> Tensor:
        """Their places in the batch; the request's first or last one for other positions."""
        offset = torch.minimum(positions - first[:, None], (length - first - 1)[:, None])
        return begin[:, None] + offset.clamp_min(0)

    device = requests.device
    slots = start[:, None] + torch.arange(PAGE_TOKENS, device=device)
    queries = end[:, None] + torch.arange(-num_queries, 0, device=device)
    sub_blocks = start[:, None] + torch.arange(0, PAGE_TOKENS, ring.block_tokens, device=device)

    width = block_table.shape[1]
    column = block.clamp_max(width - 1)
    own_page = block_table[requests, column]
    full = exists & (end == start + PAGE_TOKENS)
    table = block_table[requests]
    # Entries that are not read must not be pages of garbage: the reference backend weights them
    # with zero, and zero times NaN is not zero. The first page of the longest row will do.
    safe = table[page_counts.argmax(), 0]
    read = torch.arange(width, device=device) < page_counts[:, None]

    token_request = group.token_requests
    position = firsts[token_request] + group.token_offsets
    newest = position >= lengths[token_request] - ring.tokens
    row = position.div(PAGE_TOKENS, rounding_mode="floor")
    row = row - firsts[token_request].div(PAGE_TOKENS, rounding_mode="floor") + group.token_rows
    return Rows(
        group=group,
        page_counts=page_counts.int(),
        tail_lengths=tails.int(),
        block_table=torch.where(read, table, safe),
        complete_pages=torch.where(full, own_page, -1).int(),
        query_tokens=new_tokens(queries),
        slot_tokens=new_tokens(slots),
        slot_is_old=slots < first[:, None],
        ring_blocks=ring.block_of(requests[:, None], sub_blocks),
        store_blocks=torch.where(newest, ring.block_of(token_request, position), 0),
        store_offsets=position % ring.block_tokens,
        result_rows=row,
        result_queries=num_queries - end[row] + position,
    )
