"""What steps over an engine's pages are tested with: requests, pools of garbage, an oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS, OscarConfig
from oscar_kv.core.attention import attention
from oscar_kv.integrations.vllm.rows import DecodeRows, Ring, Rows, group_rows
from oscar_kv.integrations.vllm.step import attend_step, row_operations
from oscar_kv.kernels import pack, unpack
from oscar_kv.storage.layout import PageLayout

HEADS, GROUP, HEAD_DIM = 2, 2, 64
BLOCK = 16
SCALING = HEAD_DIM**-0.5


class Engine:
    """For each request its tokens, pages and ring.

    Args:
        longest: tokens of a request.
        drafts: of a step, beside one token.
    """

    def __init__(
        self,
        requests: int,
        longest: int,
        drafts: int = 0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device(device)
        self.layout = PageLayout(OscarConfig.compact(), HEAD_DIM, HEADS)
        generator = torch.Generator().manual_seed(longest)

        def states(heads: int, mean: float = 0.0) -> Tensor:
            numbers = torch.randn(requests, longest, heads, HEAD_DIM, generator=generator) + mean
            return numbers.to(self.device, dtype)

        self.keys, self.values = states(HEADS, 0.5), states(HEADS)
        self.queries = states(HEADS * GROUP)
        width = -(-longest // PAGE_TOKENS) + 1
        table = (1 + torch.randperm(requests * width)).view(requests, width).int()
        self.table = table.to(self.device)
        shape = (requests * width + 1, HEADS, self.layout.page_bytes)
        self.pages = torch.full(shape, 255, dtype=torch.uint8, device=self.device)
        blocks = -(-(PAGE_TOKENS + drafts) // BLOCK)
        shape = (1 + requests * blocks, HEADS, BLOCK, 2 * HEAD_DIM)
        ring_table = 1 + torch.randperm(requests * blocks).view(requests, blocks).int()
        ring = torch.full(shape, torch.nan, dtype=dtype, device=self.device)
        self.ring = Ring(ring, ring_table.to(self.device), blocks)
        self.computed = [0] * requests

    def batch(self, chunks: dict[int, int], padded: int = 0) -> list[Tensor]:
        """Of so many more tokens of these requests, and `padded` requests without any: where their
        tokens begin, how long they are, their pages and their ring."""
        order = list(chunks)
        counts = [*chunks.values(), *[0] * padded]
        begins = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        lengths = torch.tensor([*(self.computed[r] + n for r, n in chunks.items()), *[0] * padded])
        tables = (
            torch.nn.functional.pad(table[order], (0, 0, 0, padded))
            for table in (self.table, self.ring.table)
        )
        return [*(x.int().to(self.device) for x in (begins, lengths)), *tables]

    def states(self, chunks: dict[int, int]) -> list[Tensor]:
        """Queries, keys and values ``[N, heads, D]`` of a step."""
        return [
            torch.cat([x[r, self.computed[r] : self.computed[r] + n] for r, n in chunks.items()])
            for x in (self.queries, self.keys, self.values)
        ]

    def advance(self, chunks: dict[int, int]) -> None:
        for request, count in chunks.items():
            self.computed[request] += count

    def step(self, chunks: dict[int, int]) -> dict[int, Tensor]:
        """Computes so many more tokens of these requests, in this order."""
        begins, lengths, table, ring_table = self.batch(chunks)
        groups = group_rows(list(chunks.values()), table.shape[1], self.device)
        for rows in groups:
            row_operations(self.layout, self.device).locate(rows, begins, lengths, table)
        query, keys, values = self.states(chunks)
        output = torch.full_like(query, torch.nan)
        attend_step(
            query,
            keys,
            values,
            self.pages,
            replace(self.ring, table=ring_table),
            groups,
            output,
            layout=self.layout,
            most_pages=self.table.shape[1],
            scaling=SCALING,
        )
        self.advance(chunks)
        return dict(zip(chunks, output.split(list(chunks.values()))))

    def expected(self, request: int, packing: float = 0.0) -> Tensor:
        """Each token over the earlier blocks as they were packed, and its own block exactly.

        Args:
            packing: how far pages may be from what they should be, relative to that.
        """
        keys, values = (x[request, : self.computed[request]] for x in (self.keys, self.values))
        answers = []
        for begin in range(0, len(keys), PAGE_TOKENS):
            whole = begin // PAGE_TOKENS
            pages = self.pages[self.table[request, :whole].long()]
            exact_keys, exact_values = (
                x[:begin].unflatten(0, (whole, PAGE_TOKENS)).transpose(1, 2) for x in (keys, values)
            )
            written, wanted = (
                unpack(data, self.layout)
                for data in (pages, pack(exact_keys, exact_values, self.layout))
            )
            for one, other in zip(written, wanted):
                assert (one - other).norm() <= packing * other.norm()
            packed = [states.transpose(1, 2).flatten(0, 1) for states in written]
            own = slice(begin, begin + PAGE_TOKENS)
            query = self.queries[request, own][: len(keys) - begin]
            seen_keys, seen_values = (
                torch.cat([old.double(), new[own].double()])
                for old, new in zip(packed, (keys, values))
            )
            answer = attention(
                query.double().transpose(0, 1).unsqueeze(0),
                seen_keys.transpose(0, 1).unsqueeze(0),
                seen_values.transpose(0, 1).unsqueeze(0),
                scaling=SCALING,
            )
            answers.append(answer[0].transpose(0, 1))
        return torch.cat(answers)


class DecodeStep:
    """A step of up to ``requests`` requests with up to ``tokens`` new ones each, as a graph has it:
    what varies is in memory that stays where it is.

    Args:
        tokens: of every request, but for those that fill up the batch.
    """

    def __init__(self, engine: Engine, requests: int, tokens: int) -> None:
        self.engine, self.requests, self.tokens = engine, requests, tokens
        device, width = engine.device, engine.table.shape[1]
        self.rows = DecodeRows(requests, tokens, width, device)
        self.operations = row_operations(engine.layout, device)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.batch = [
            numbers(requests + 1),
            numbers(requests),
            numbers(requests, width),
            numbers(requests, engine.ring.blocks),
        ]
        shape, dtype = (requests * tokens, HEADS * GROUP, HEAD_DIM), engine.keys.dtype
        self.query = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = (self.query[:, :HEADS].clone() for _ in range(2))
        self.output = torch.full_like(self.query, torch.nan)
        ring = replace(engine.ring, table=self.batch[3])
        located = self.rows.of([tokens] * requests, requests * tokens)
        assert located is not None

        def run() -> None:
            attend_step(
                self.query,
                self.keys,
                self.values,
                engine.pages,
                ring,
                [located],
                self.output,
                layout=engine.layout,
                most_pages=width,
                scaling=SCALING,
            )

        self.run: Callable[[], object] = run

    def load(self, chunks: dict[int, int]) -> Rows:
        """What happens before a graph is replayed."""
        padded = self.requests - len(chunks)
        for target, source in zip(self.batch, self.engine.batch(chunks, padded)):
            target.copy_(source)
        for target, source in zip((self.query, self.keys, self.values), self.engine.states(chunks)):
            target[: len(source)] = source
        rows = self.rows.of([*chunks.values(), *[0] * padded], len(self.output))
        assert rows is not None
        self.operations.locate(rows, *self.batch[:3])
        return rows

    def __call__(self, chunks: dict[int, int]) -> dict[int, Tensor]:
        self.load(chunks)
        self.run()
        self.engine.advance(chunks)
        found = self.output[: sum(chunks.values())].clone()
        return dict(zip(chunks, found.split(list(chunks.values()))))
