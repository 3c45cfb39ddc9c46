"""Decode attention in CUDA C++: the host side of ``cuda/decode.cu``.

The same work as :mod:`~oscar_kv.kernels.triton_decode`, faster at every size (docs/performance.md),
for shapes that most models have: see :func:`unsupported` and :func:`takes`. Triton does the rest.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.cuda_driver import Program, Run, run
from oscar_kv.kernels.device import (
    block_shared_memory,
    multiprocessors,
    shared_memory,
)
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.paged import Sequences

WARPS = 4
"""Warps of a block."""
COLUMNS = 8
"""Query rows of a KV head, at most."""
DENSE_TOKENS = 32 * WARPS
"""Full-precision tokens of a block."""
_MOST_BLOCKS_PER_SM = 2  # so that a thread has the registers it needs
_LONGEST_WINDOW = 1 << 30  # longer ones see everything, too, and have to fit 32 bits
_RESERVED_SHARED_MEMORY = 1024  # of every block, by the hardware


class DecodeArguments(ctypes.Structure):
    """``struct Arguments`` of ``decode.cu``."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("page_counts", ctypes.c_void_p),
        ("tail_lengths", ctypes.c_void_p),
        ("sink_lengths", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("dense_keys", ctypes.c_void_p * 3),
        ("dense_values", ctypes.c_void_p * 3),
        ("sums", ctypes.c_void_p),
        ("maxima", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("dense_slots", ctypes.c_int * 3),
        ("dense_tokens", ctypes.c_int * 3),
        ("owners", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("num_queries", ctypes.c_int),
        ("page_blocks", ctypes.c_int),
        ("page_parts", ctypes.c_int),
        ("page_slots", ctypes.c_int),
        ("dense_parts", ctypes.c_int),
        ("dense_apart", ctypes.c_int),
        ("has_new", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class CombineArguments(ctypes.Structure):
    """``struct Arguments`` of ``combine.cu``."""

    _fields_ = (
        ("sums", ctypes.c_void_p),
        ("maxima", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("sink_logits", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("page_parts", ctypes.c_int),
        ("page_slots", ctypes.c_int),
        ("dense_parts", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("num_queries", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("wide_sinks", ctypes.c_int),
    )


@dataclass(frozen=True)
class Plan:
    """How work is divided: every sequence and KV head alike, or, *streamed*, all of it evenly."""

    team: int
    """Warps that share a page."""
    page_parts: int
    """Blocks that share the pages of a sequence and KV head; 0 if streamed."""
    dense_parts: int
    """Runs of ``DENSE_TOKENS`` full-precision tokens of a sequence and KV head."""
    dense_apart: bool = False
    """Whether these have blocks of their own; otherwise the blocks of pages do them too."""
    streamed: int = 0
    """Blocks that share all work evenly, whoever it belongs to."""

    def page_blocks(self, owners: int) -> int:
        """All but those of full-precision tokens alone; ``owners``: sequences times KV heads."""
        return self.streamed or owners * self.page_parts

    def blocks(self, owners: int) -> int:
        """Of all."""
        return self.page_blocks(owners) + (owners * self.dense_parts if self.dense_apart else 0)

    def page_slots(self, owners: int) -> int:
        """Partial results of pages. A streamed block has one for every owner that it works for."""
        return self.page_blocks(owners) + (owners if self.streamed else 0)


def unsupported(layout: PageLayout) -> str | None:
    """Why the kernel cannot read pages of ``layout``, ``None`` if it can."""
    for name, channels in (("head_dim", layout.head_dim), ("value_head_dim", layout.value_dim)):
        if channels not in (64, 128):
            return f"{name}={channels}: takes 64 and 128"
    if layout.value_group % 16:
        return f"value_group={layout.value_group}: takes multiples of 16"
    if layout.token_scales_per_page % 8:
        return f"token scales shared by {layout.num_kv_heads} heads"
    return None


def takes(call: AttentionCall) -> bool:
    """Whether the kernel does this attention: few rows of 16 bits, no mask but positions."""
    return (
        call.rows <= COLUMNS
        and call.visibility.mask is None
        and call.query.dtype == call.packed.dtype
        and call.query.dtype in (torch.float16, torch.bfloat16)
        and unsupported(call.packed.layout) is None
    )


@lru_cache(maxsize=256)
def decode_program(
    layout: PageLayout, dtype: torch.dtype, team: int, streamed: bool = False
) -> Program:
    """The kernel that finds the parts; its constants come from the one definition of a page."""
    config = layout.config
    # A page up to its unit, and behind it the token scales that lie in other heads' pages.
    scales = 2 * PAGE_TOKENS if config.token_scale == "cross_head" else 0
    stage = layout.fields["value_unit"].offset + 16 + scales
    constants = {
        "WARPS": WARPS,
        "COLUMNS": COLUMNS,
        "HEADS": layout.num_kv_heads,
        "HEAD_DIM": layout.head_dim,
        "VALUE_DIM": layout.value_dim,
        "KEY_SETS": config.key_bits // 2,
        "VALUE_SETS": config.value_bits // 2,
        "KEY_GROUPS": PAGE_TOKENS // config.key_group,
        "VALUE_GROUPS": layout.value_dim // layout.value_group,
        "FP8": int(config.metadata == "fp8"),
        "SHARED_SCALE": int(config.token_scale == "cross_head"),
        "SCALES_PER_PAGE": layout.token_scales_per_page,
        "PAGE_BYTES": layout.page_bytes,
        **{name.upper(): field.offset for name, field in layout.fields.items()},
        "BFLOAT": int(dtype == torch.bfloat16),
        "ROTATION_UNIT": f"{layout.head_dim**-0.5!r}f",
        "TEAM": team,
        "DENSE_TOKENS": DENSE_TOKENS,
        "STAGE_BYTES": stage,
        "STREAMED": int(streamed),
        "BLOCKS_PER_SM": _MOST_BLOCKS_PER_SM,
    }
    # Two pages per team, and the query with its factors; afterwards what warps found, to merge.
    query = COLUMNS * (2 * layout.head_dim + 4)
    merging = WARPS * COLUMNS * 4 * (layout.value_dim + 4 + 2)
    memory = max(2 * stage * WARPS // team + query, merging)
    return Program("decode", tuple(constants.items()), 32 * WARPS, memory)


@lru_cache(maxsize=64)
def combine_program(value_dim: int, dtype: torch.dtype, streamed: bool = False) -> Program:
    """The kernel that merges the parts."""
    constants = {
        "WARPS": WARPS,
        "VALUE_DIM": value_dim,
        "BFLOAT": int(dtype == torch.bfloat16),
        "STREAMED": int(streamed),
        "ROTATION_UNIT": f"{value_dim**-0.5!r}f",
    }
    # What every lane found: sums of packed and of dense tokens, maximum, normalizer.
    memory = 32 * WARPS * 4 * (2 * value_dim // 32 + 2)
    return Program("combine", tuple(constants.items()), 32 * WARPS, memory)


def plan(packed: Sequences, num_new: int) -> Plan:
    """How to divide a decode step; for any lengths alike where only the device knows them."""
    layout, device = packed.layout, packed.device
    dense = sum(-(-tokens // DENSE_TOKENS) for tokens in _dense_tokens(packed, num_new))
    owners = packed.batch_size * layout.num_kv_heads

    def memory(team: int) -> int:
        return decode_program(layout, packed.dtype, team).shared_memory + _RESERVED_SHARED_MEMORY

    fewest = next(team for team in (1, 2, 4) if memory(team) <= block_shared_memory(device))
    together = min(_MOST_BLOCKS_PER_SM, shared_memory(device) // memory(fewest))
    processors = multiprocessors(device)
    streamed = Plan(fewest, 0, dense, streamed=together * processors)
    if packed.total_pages is None:
        return streamed
    read = layout.num_kv_heads * packed.total_pages
    team, parts = _divide(
        packed.batch_size, owners, packed.most_pages, read, processors, together, fewest
    )
    if not parts:
        return streamed
    return Plan(team, parts, dense, dense_apart=(parts + dense) * owners <= together * processors)


@lru_cache(maxsize=4096)
def _divide(
    sequences: int,
    owners: int,
    pages: int,
    read: int,
    processors: int,
    together: int,
    fewest: int,
) -> tuple[int, int]:
    """The team and the parts that are done first, for ``owners`` sequences times KV heads.

    No parts mean that blocks share all work evenly.

    Args:
        pages: of the longest sequence.
        read: pages of all sequences and KV heads.
        processors: SMs of the GPU, which work on up to `together` blocks at a time.
        fewest: warps of a team whose pages fit a block.
    """
    # A page at once for every team, if SMs have no more than one block then, or half of them one.
    for team, share in ((4, 0.5), (2, 1.0)):
        parts = max(1, -(-pages * team // WARPS))
        if team >= fewest and owners * parts <= share * processors:
            return team, parts
    teams = WARPS // fewest

    # Time of the busiest SM, in pages of a team; the constants were fitted to measurements.
    def cost(parts: int) -> float:
        """An only block has the SM to itself and gains little by that; every block costs as much
        as another page."""
        blocks = -(-owners * parts // processors)
        pace = 1.2 if min(blocks, together) == 1 else 1.0
        return blocks * (pace * -(-pages // (parts * teams)) + 1)

    # A block has to find its share first, by looking at all sequences; going on to the next owner
    # costs more than a page.
    even = (read / teams + 1.25 * owners) / processors + 1.75 * together + 0.04 * sequences
    most = max(1, min(-(-pages // teams), 4 * together * processors // owners))
    parts = min(range(1, most + 1), key=cost)
    return fewest, parts if cost(parts) <= even else 0


def _dense_tokens(packed: Sequences, num_new: int) -> tuple[int, int, int]:
    """The most tokens of a sequence in the tail, in the sinks, and that are new."""
    return packed.most_tail_tokens, packed.sink_keys.shape[2], num_new


def decode(call: AttentionCall, work: Plan | None = None, run: Run = run) -> Tensor:
    """:func:`oscar_kv.kernels.reference.attend` for a few query rows.

    Args:
        work: how to divide it; by :func:`plan` if omitted.
        run: runs a program; on a GPU unless a test brings another.
    """
    query, packed, new_keys, new_values = call.query, call.packed, call.new_keys, call.new_values
    scaling, s_aux, visibility = call.scaling, call.s_aux, call.visibility
    layout, device = packed.layout, packed.device
    if scaling < 0:
        query, scaling = -query, -scaling
    query = _aligned(query)
    batch, num_heads, num_queries, _ = query.shape
    num_new = 0 if new_keys is None else num_queries
    if work is None:
        work = plan(packed, num_new)
    keys = [packed.tail_keys, packed.sink_keys, query if new_keys is None else new_keys]
    values = [packed.tail_values, packed.sink_values, query if new_values is None else new_values]
    keys, values = ([_aligned(x) for x in parts] for parts in (keys, values))
    starts = None if visibility.starts is None else visibility.starts.to(torch.int32)
    if s_aux is not None and s_aux.dtype not in (torch.float32, query.dtype):
        s_aux = s_aux.float()
    owners = batch * layout.num_kv_heads
    page_slots = work.page_slots(owners)
    slots = (page_slots + owners * work.dense_parts, call.rows)
    sums = torch.empty((*slots, layout.value_dim), dtype=torch.float32, device=device)
    maxima = torch.empty((*slots, 2), dtype=torch.float32, device=device)
    ranges = None
    if work.streamed:
        ranges = torch.empty((owners, 2), dtype=torch.int32, device=device)
    out = call.new_result()
    parts = DecodeArguments(
        pool=packed.page_data.data_ptr(),
        table=packed.block_table.data_ptr(),
        page_counts=packed.page_counts.data_ptr(),
        tail_lengths=packed.tail_lengths.data_ptr(),
        sink_lengths=packed.sink_lengths.data_ptr(),
        starts=None if starts is None else starts.data_ptr(),
        query=query.data_ptr(),
        dense_keys=(ctypes.c_void_p * 3)(*(x.data_ptr() for x in keys)),
        dense_values=(ctypes.c_void_p * 3)(*(x.data_ptr() for x in values)),
        sums=sums.data_ptr(),
        maxima=maxima.data_ptr(),
        ranges=None if ranges is None else ranges.data_ptr(),
        table_stride=packed.block_table.stride(0),
        table_width=packed.block_table.shape[1],
        dense_slots=(ctypes.c_int * 3)(*(x.shape[2] for x in keys)),
        dense_tokens=(ctypes.c_int * 3)(*_dense_tokens(packed, num_new)),
        owners=owners,
        rows=call.rows,
        num_queries=num_queries,
        page_blocks=work.page_blocks(owners),
        page_parts=work.page_parts,
        page_slots=page_slots,
        dense_parts=work.dense_parts,
        dense_apart=int(work.dense_apart),
        has_new=int(num_new > 0),
        window=min(visibility.sliding_window or 0, _LONGEST_WINDOW),
        scaling=scaling,
        softcap=call.softcap or 0.0,
    )
    streamed = work.streamed > 0
    program = decode_program(layout, query.dtype, work.team, streamed)
    run(program, parts, work.blocks(owners), device)
    merged = CombineArguments(
        sums=sums.data_ptr(),
        maxima=maxima.data_ptr(),
        ranges=parts.ranges,
        sink_logits=None if s_aux is None else s_aux.data_ptr(),
        out=out.data_ptr(),
        page_parts=work.page_parts,
        page_slots=page_slots,
        dense_parts=work.dense_parts,
        rows=call.rows,
        num_queries=num_queries,
        num_heads=num_heads,
        wide_sinks=int(s_aux is not None and s_aux.dtype == torch.float32),
    )
    rows = batch * num_heads * num_queries
    run(combine_program(layout.value_dim, query.dtype, streamed), merged, rows, device)
    return out


def _aligned(states: Tensor) -> Tensor:
    """Contiguous, and where a kernel may load 16 bytes at once."""
    if states.is_contiguous() and states.data_ptr() % 16 == 0:
        return states
    return states.clone(memory_format=torch.contiguous_format)
