"""Attention over BF16 keys and values, as fast as this machine can be made to do it.

Decode: PyTorch's flash, cuDNN and memory-efficient kernels, each with ``enable_gqa`` and with the
query heads of a KV head given as query rows (the same result for one new token, and each key is
read once); our split-K kernel (`splitk.py`), tuned for the shape; FlashAttention and FlashInfer
where they can be imported. Extending a prefix: PyTorch's flash kernel with its bottom-right
causal mask, and flash and cuDNN without a mask, which does a little more work (all new tokens see
each other) and is offered because cuDNN's causal mask is top-left aligned.

Every output is checked against the float64 oracle; a baseline that fails it, or that cannot serve
a shape, is listed with the reason and never compared with.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu import oracle
from benchmarks.gpu.splitk import Launch, SplitK, launches
from benchmarks.gpu.timing import Call, Timing, time_calls

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

SPLIT_K = "triton split-K"

States = tuple[Tensor, Tensor]
Build = Callable[[Tensor, States], Call]


@dataclass
class Found:
    """What the baselines of one shape took."""

    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Against the float64 oracle."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why the others are not compared with."""
    launch: Launch | None = None
    """Of the split-K kernel, as tuned for the shape."""

    @property
    def best(self) -> str | None:
        """The fastest of those that are right."""
        return min(self.timings, key=lambda name: self.timings[name].p50, default=None)

    def row(self) -> dict[str, Any]:
        """Columns of a result file."""
        best = self.best
        return {
            "best_bf16": best,
            "best_bf16_us": None if best is None else self.timings[best].p50,
            "best_bf16_error": None if best is None else self.errors[best],
            "bf16_us": {name: timing.p50 for name, timing in self.timings.items()},
            "bf16_refused": self.refused,
            "split_k_launch": str(self.launch),
        }

    def add(
        self,
        name: str,
        build: Build,
        query: Tensor,
        copies: Sequence[States],
        check: Callable[[Tensor], float],
    ) -> None:
        """Times a baseline over all copies, if it can serve them and is right."""
        try:
            calls = [build(query, states) for states in copies]
            timing = time_calls(calls, sum(states.nbytes for states in copies[0]))
        except (RuntimeError, ValueError, TypeError, ImportError, AttributeError) as problem:
            if "illegal memory access" in str(problem):
                raise
            self.refused[name] = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            return
        error = check(timing.output)
        if not error <= oracle.TOLERANCE:
            self.refused[name] = f"off by {error:.1e}"
            return
        self.timings[name], self.errors[name] = timing, error


def decode(query: Tensor, copies: Sequence[States]) -> Found:
    """Every baseline for one new token per sequence, ``query [B, Hq, 1, D]``."""
    found = Found()

    def check(out: Tensor) -> float:
        return oracle.dense_error(out.reshape(query.shape), query, *copies[0])

    builds: dict[str, Build] = {}
    for name, backend in SDPA.items():
        builds[f"sdpa {name} gqa"] = partial(_sdpa_gqa, backend)
        builds[f"sdpa {name} rows"] = partial(_sdpa_rows, backend)
    builds |= {"flash_attn": _flash_attention, "flash_attn_3": _flash_attention_3}
    builds |= {"flashinfer": _flashinfer}
    for name, build in builds.items():
        found.add(name, build, query, copies, check)
    lengths = full_lengths(*copies[0])
    try:
        found.launch = tuned(query, copies, lengths)
    except RuntimeError as problem:
        found.refused[SPLIT_K] = str(problem).splitlines()[0]
        return found
    found.add(SPLIT_K, partial(_split_k, found.launch, lengths), query, copies, check)
    return found


def tuned(query: Tensor, copies: Sequence[States], lengths: Tensor) -> Launch:
    """The fastest launch of the split-K kernel for this shape."""
    keys = copies[0][0]
    multiprocessors = 132
    if query.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    choices = launches(keys.shape[0], keys.shape[1], int(lengths.max()), multiprocessors)
    if not query.is_cuda:
        return choices[0]

    def microseconds(launch: Launch) -> float:
        calls = [_split_k(launch, lengths, query, states) for states in copies]
        return time_calls(calls, 2 * keys.nbytes, replays=5).p50

    return min(choices, key=microseconds)


def split_k(launch: Launch, lengths: Tensor, query: Tensor, copies: Sequence[States]) -> Timing:
    """The split-K kernel over sequences of unequal ``lengths``."""
    calls = [_split_k(launch, lengths, query, states) for states in copies]
    return time_calls(calls, sum(states.nbytes for states in copies[0]))


def extend(query: Tensor, copies: Sequence[States]) -> Found:
    """Baselines for ``Tq`` new tokens, the newest of the keys: ``query [B, Hq, Tq, D]``."""
    found = Found()
    for name, backend in SDPA.items():
        found.add(
            f"sdpa {name}, unmasked",
            partial(_sdpa_gqa, backend),
            query,
            copies,
            lambda out: oracle.dense_error(out, query, *copies[0], causal=False),
        )
    found.add(
        "sdpa flash, causal bottom-right",
        _flash_lower_right,
        query,
        copies,
        lambda out: oracle.dense_error(out, query, *copies[0]),
    )
    return found


def full_lengths(keys: Tensor, values: Tensor) -> Tensor:
    """int32 ``[B]``: every sequence is as long as the states."""
    return torch.full((keys.shape[0],), keys.shape[2], dtype=torch.int32, device=keys.device)


def _split_k(launch: Launch, lengths: Tensor, query: Tensor, states: States) -> Call:
    keys, values = states
    batch, heads, _, dim = query.shape
    kernel = SplitK(batch, heads, keys.shape[1], dim, launch, query.device)
    return lambda: kernel(query, keys, values, lengths)


def _sdpa_gqa(backend: SDPBackend, query: Tensor, states: States) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, *states, enable_gqa=True)

    return call


def _sdpa_rows(backend: SDPBackend, query: Tensor, states: States) -> Call:
    rows = query.view(query.shape[0], states[0].shape[1], -1, query.shape[3])

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(rows, *states)

    return call


def _flash_lower_right(query: Tensor, states: States) -> Call:
    bias: Any = causal_lower_right(query.shape[2], states[0].shape[2])

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, *states, attn_mask=bias, enable_gqa=True)

    return call


def _flash_attention(query: Tensor, states: States, module: str = "flash_attn") -> Call:
    attend = importlib.import_module(module).flash_attn_with_kvcache
    keys, values = (part.transpose(1, 2).contiguous() for part in states)
    rows, lengths = query.transpose(1, 2), full_lengths(*states)

    def call() -> Tensor:
        out = attend(rows, keys, values, cache_seqlens=lengths)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _flash_attention_3(query: Tensor, states: States) -> Call:
    return _flash_attention(query, states, "flash_attn_interface")


def _flashinfer(query: Tensor, states: States, page: int = 64) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    batch, heads, _, dim = query.shape
    kv_heads, tokens = states[0].shape[1:3]
    pages = batch * tokens // page
    paged = tuple(
        part.view(batch, kv_heads, tokens // page, page, dim).transpose(1, 2).flatten(0, 1)
        for part in states
    )
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    indptr = torch.arange(0, pages + 1, tokens // page, dtype=torch.int32)
    indices = torch.arange(pages, dtype=torch.int32, device=query.device)
    last = torch.full((batch,), page, dtype=torch.int32)
    wrapper.plan(indptr, indices, last, heads, kv_heads, dim, page, q_data_type=query.dtype)
    return lambda: wrapper.run(query[:, :, 0], paged).unsqueeze(2)
