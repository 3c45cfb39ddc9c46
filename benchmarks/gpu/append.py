"""What one layer pays per decode step to store a token: ``OscarCache.update`` inside a CUDA graph.

A graph holds 128 steps, in which every sequence completes exactly one page: the cost of packing
it is spread over the steps it serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.gpu import oracle
from benchmarks.gpu.report import Row
from benchmarks.gpu.states import config_of, random_states
from benchmarks.gpu.timing import REPLAYS, device, summarize, time_replays
from oscar_kv.config import PAGE_TOKENS
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.kernels import pack, unpack
from oscar_kv.storage.packed import PackedKV

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
_MODEL = LlamaConfig(
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
)


@torch.no_grad()
def rows(preset: str, batch: int, context: int = 4096) -> Iterator[Row]:
    """Microseconds per layer and step at ``context`` tokens, a multiple of 128."""
    size = (batch, KV_HEADS, context, HEAD_DIM)
    keys, values = random_states(size, device(), torch.bfloat16)
    most = context + (REPLAYS + 4) * PAGE_TOKENS
    cache = OscarCache(_MODEL, config_of(preset), max_tokens=most)
    cache.update(keys, values, 0)
    new = tuple(states[:, :, :PAGE_TOKENS] for states in (keys, values))
    steps = [[states[:, :, t : t + 1].contiguous() for states in new] for t in range(PAGE_TOKENS)]

    def append() -> None:
        for step_keys, step_values in steps:
            cache.update(step_keys, step_values, 0)

    append()  # compiles what the graph will hold
    cache.reserve(most - cache.get_seq_length())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append()

    def replay() -> None:
        graph.replay()
        cache.advance(PAGE_TOKENS)

    packed = cast(OscarLayer, cache.layers[0]).packed
    assert packed is not None
    p20, p50, p80 = summarize(time_replays(replay, REPLAYS, PAGE_TOKENS))
    yield {
        "case": f"append, batch {batch}",
        "variant": preset,
        "kind": "append",
        "preset": preset,
        "batch": batch,
        "context": context,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "us_p20": p20,
        "us_p50": p50,
        "us_p80": p80,
        "oracle_error": _error(packed, *new),
    }


def _error(packed: PackedKV, keys: Tensor, values: Tensor) -> float:
    """How far the newest page is from these tokens packed at once, and the tail from themselves."""
    whole = unpack(pack(keys, values, packed.layout), packed.layout, torch.float64)
    pages = packed.pages_per_sequence[0]
    page = slice((pages - 1) * PAGE_TOKENS, pages * PAGE_TOKENS)
    tail = packed.tails_per_sequence[0]
    found = packed.dense(torch.float64)
    errors = [oracle.relative_error(a[:, :, page], b) for a, b in zip(found, whole)]
    if tail:
        for states, exact in zip(found, (keys, values)):
            repeats = -(-tail // PAGE_TOKENS)
            expected = exact.repeat(1, 1, repeats, 1)[:, :, :tail]
            errors.append(oracle.relative_error(states[:, :, -tail:], expected))
    return oracle.worst(errors)
