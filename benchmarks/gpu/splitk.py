"""A split-K decode kernel over BF16 keys and values: the baseline at small batch.

The query heads of a KV head are the rows of one matrix, a sequence is split over programs, and the
last program of a (sequence, KV head) to finish combines what all of them found, so that a call is
one launch. Lengths are read on the device: it serves a preallocated cache inside a CUDA graph.
"""
# Triton's own annotations do not describe what runs inside a kernel:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 128
_ROWS = 16  # the smallest M of a matrix unit
_TILES = ((32, 4, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 2))  # keys, warps, stages


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched."""

    block: int
    """Keys per step."""
    warps: int
    stages: int
    splits: int

    def __str__(self) -> str:
        return f"block {self.block}, {self.warps} warps, {self.stages} stages, {self.splits} splits"


def launches(batch: int, kv_heads: int, tokens: int, multiprocessors: int) -> list[Launch]:
    """The launches worth trying: one to four programs per multiprocessor."""
    found = []
    for block, warps, stages in _TILES:
        most = min(MAX_SPLITS, math.ceil(tokens / block))
        wanted = {
            max(1, min(most, round(waves * multiprocessors / (batch * kv_heads))))
            for waves in (1, 2, 4)
        }
        found += [Launch(block, warps, stages, splits) for splits in sorted(wanted)]
    return found


class SplitK:
    """Decode attention of one new token per sequence; owns the memory between its programs.

    Args:
        batch, heads, kv_heads, head_dim: sizes; 1, 2, 4, 8 or 16 query heads per KV head.
        launch: one of :func:`launches`.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        launch: Launch,
        device: torch.device,
    ) -> None:
        self.launch = launch
        self.partial = torch.empty((batch, heads, launch.splits, head_dim), device=device)
        self.stats = torch.empty((batch, heads, launch.splits, 2), device=device)
        self.arrived = torch.zeros((batch, kv_heads), dtype=torch.int32, device=device)

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        scaling: float | None = None,
    ) -> Tensor:
        """Attention over the first ``lengths`` tokens of each sequence.

        Args:
            query: ``[B, Hq, 1, D]``.
            keys, values: contiguous ``[B, H, capacity, D]``.
            lengths: int32 ``[B]`` on the device, at least 1.

        Returns:
            ``[B, Hq, 1, D]``.
        """
        batch, heads, _, dim = query.shape
        kv_heads, capacity = keys.shape[1:3]
        query = query.contiguous()
        out = torch.empty_like(query)
        group = heads // kv_heads
        scaling = dim**-0.5 if scaling is None else scaling
        _decode[(self.launch.splits, kv_heads, batch)](
            query, keys, values, lengths, self.partial, self.stats, self.arrived, out,
            capacity, scaling * math.log2(math.e),
            kv_heads=kv_heads, group=group, dim=dim, block=self.launch.block,
            stages=self.launch.stages, rows=_ROWS, max_splits=MAX_SPLITS,
            chunk=max(1, 64 // group), num_warps=self.launch.warps,
        )  # fmt: skip
        return out


@triton.jit(do_not_specialize=["capacity"])
def _decode(
    query, keys, values, lengths, partial, stats, arrived, out, capacity, scale,
    kv_heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, block: tl.constexpr,
    stages: tl.constexpr, rows: tl.constexpr, max_splits: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    sequence_head = row * kv_heads + head
    first = sequence_head * group  # of this program's query heads
    h, d, t = tl.arange(0, rows), tl.arange(0, dim), tl.arange(0, block)
    is_head = h < group
    q = tl.load(query + (first + h)[:, None] * dim + d, mask=is_head[:, None], other=0.0)
    keys += sequence_head.to(tl.int64) * capacity * dim
    values += sequence_head.to(tl.int64) * capacity * dim
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, block), splits) * block
    begin = split * share
    end = tl.minimum(begin + share, length)

    largest = tl.full([rows], -1e30, tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, dim], tl.float32)
    for start in tl.range(begin, end, block, num_stages=stages):
        token = start + t
        inside = token < end
        offsets = token[:, None] * dim + d
        k = tl.load(keys + offsets, mask=inside[:, None], other=0.0)
        logits = tl.where(inside, tl.dot(q, tl.trans(k)) * scale, -1e30)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        decay = tl.exp2(largest - new_largest)
        p = tl.exp2(logits - new_largest[:, None])
        largest = new_largest
        total = total * decay + tl.sum(p, 1)
        v = tl.load(values + offsets, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])

    slot = (first + h) * splits + split
    tl.store(partial + slot[:, None] * dim + d, acc, mask=is_head[:, None])
    tl.store(stats + slot * 2, largest, mask=is_head)
    tl.store(stats + slot * 2 + 1, total, mask=is_head)
    tl.debug_barrier()
    if tl.atomic_add(arrived + sequence_head, 1, sem="acq_rel") == splits - 1:
        tl.debug_barrier()
        _combine(partial, stats, out, first, splits, group, dim, max_splits, chunk)
        tl.store(arrived + sequence_head, 0)


@triton.jit
def _combine(
    partial, stats, out, first, splits,
    group: tl.constexpr, dim: tl.constexpr, max_splits: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Weighs the partial results of all splits; they bypass L1, where they may be stale."""
    g, d = tl.arange(0, group), tl.arange(0, dim)
    s, c = tl.arange(0, max_splits), tl.arange(0, chunk)
    slots = (first + g)[:, None] * splits
    known = (s < splits)[None, :] & (g < group)[:, None]
    largest = tl.load(stats + (slots + s) * 2, mask=known, other=-1e30, cache_modifier=".cg")
    total = tl.load(stats + (slots + s) * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
    peak = tl.max(largest, 1)
    denominator = tl.sum(total * tl.exp2(largest - peak[:, None]), 1)
    acc = tl.zeros([group, chunk, dim], tl.float32)
    for begin in range(0, splits, chunk):
        inside = (begin + c < splits)[None, :] & (g < group)[:, None]
        slot = slots + begin + c
        part = tl.load(
            partial + slot[:, :, None] * dim + d,
            mask=inside[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        weight = tl.load(stats + slot * 2, mask=inside, other=-1e30, cache_modifier=".cg")
        acc += part * tl.exp2(weight - peak[:, None])[:, :, None]
    result = tl.sum(acc, 1) / denominator[:, None]
    tl.store(out + (first + g)[:, None] * dim + d, result.to(out.dtype.element_ty))
