"""GPU times: CUDA graphs, a cold L2 cache, medians.

**Graphs.** Calls are captured into one CUDA graph, so that neither Python nor launches of single
kernels are in the figures: they are what a decode step inside a graph pays. A graph holds about a
millisecond of work or more and replays are queued back to back, with an event between any two of
them: the time of a replay over its number of calls is one sample. Reported are the 20th, 50th and
80th percentile of the samples.

**Cold L2.** In a model, a layer's weights pass through the L2 cache before its KV cache is read
again. A loop over one input would read it from L2 instead. Hence every call has a copy of the
large inputs of its own, in memory of its own, and calls take turns over so many copies that their
bytes exceed the L2 cache several times. Nothing is flushed, so nothing has to be subtracted. The
query, which a model has just computed, is shared, and warm.

**Outputs.** What the last captured call returned is overwritten with NaN, the graph is replayed
once more, and that output is handed to whoever checks it.

**Ceilings.** What this GPU can do, from the same clock: a device-to-device copy (bytes read plus
bytes written) and a kernel that only reads.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

REPLAYS = 25
GRAPH_MICROSECONDS = 1000.0
"""The work in one graph, at least, as estimated from its bytes."""
COPIES_OF_L2 = 3
"""Bytes of all copies of an input, in sizes of the L2 cache, at least."""

_ASSUMED_L2 = 60 << 20
_FLOOR_MICROSECONDS, _ASSUMED_BYTES_PER_MICROSECOND = 4.0, 4e6

Call = Callable[[], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, and what it computed."""

    p20: float
    p50: float
    p80: float
    output: Tensor

    def row(self) -> dict[str, float]:
        """The percentiles, as columns of a result file."""
        return {"us_p20": self.p20, "us_p50": self.p50, "us_p80": self.p80}

    def bandwidth(self, nbytes: int, ceiling: dict[str, float]) -> dict[str, float]:
        """Columns that say how fast ``nbytes`` were moved, also as a share of the measured copy."""
        achieved = nbytes / self.p50 / 1e6
        return {"bytes": nbytes, "tb_s": achieved, "of_copy": achieved / ceiling["copy_tb_s"]}


def device() -> torch.device:
    """The GPU; the CPU where there is none, which only dry runs of tests accept."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_gpu() -> None:
    """Raises SystemExit, with a line that says so, where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("error: these benchmarks need a CUDA GPU, and torch sees none")


def copies_for(nbytes: int) -> int:
    """How many copies of inputs of ``nbytes`` keep the L2 cache cold."""
    l2 = _ASSUMED_L2
    if torch.cuda.is_available():
        l2 = torch.cuda.get_device_properties(device()).L2_cache_size
    return max(1, math.ceil(COPIES_OF_L2 * l2 / nbytes))


@torch.no_grad()
def time_calls(calls: Sequence[Call], nbytes: int, replays: int = REPLAYS) -> Timing:
    """Times calls that do the same work on copies of its inputs; one by one in dry runs on a CPU.

    Args:
        calls: one per copy; each returns its output.
        nbytes: bytes that one call moves, from which the calls per graph are estimated.
        replays: samples.
    """
    if not torch.cuda.is_available():
        return _time_on_cpu(calls)
    expected = max(_FLOOR_MICROSECONDS, nbytes / _ASSUMED_BYTES_PER_MICROSECOND)
    rounds = math.ceil(GRAPH_MICROSECONDS / expected / len(calls))
    outputs: list[Tensor] = []

    def work() -> None:
        outputs[:] = [call() for _ in range(rounds) for call in calls]

    warm_up(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    samples = time_replays(graph.replay, replays, rounds * len(calls))
    output = outputs[-1]
    if output.is_floating_point():
        output.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return _timing(samples, output.clone())


def warm_up(calls: Sequence[Callable[[], Any]]) -> None:
    """Runs every call once on a stream of its own: what compiles or allocates does so now."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def time_replays(replay: Callable[[], Any], replays: int, calls: int) -> list[float]:
    """Microseconds per call of each of ``replays`` runs of ``calls`` calls, queued back to back."""
    for _ in range(2):
        replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for event in events[:-1]:
        event.record()
        replay()
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 / calls for a, b in pairwise(events)]


def summarize(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(samples, n=10)
    return deciles[1], deciles[4], deciles[7]


def ceilings(megabytes: int = 1024) -> dict[str, float]:
    """Measured bandwidth in TB/s: ``copy_tb_s`` (read plus written) and ``read_tb_s``."""
    source = torch.randint(1 << 20, (megabytes << 18,), dtype=torch.int32, device=device())
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], 2 * source.nbytes)
    sink = torch.zeros(1, dtype=torch.int32, device=device())

    def read() -> Tensor:
        block, steps = 4096, 8
        _read[(source.numel() // (block * steps),)](source, sink, block, steps)  # pyright: ignore[reportArgumentType]
        return sink

    reading = time_calls([read], source.nbytes)
    return {
        "copy_tb_s": 2 * source.nbytes / copy.p50 / 1e6,
        "read_tb_s": source.nbytes / reading.p50 / 1e6,
    }


class Budget:
    """Wall time: what is begun is finished, what would begin too late is skipped and named."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds = time.monotonic(), seconds
        self.skipped: list[str] = []

    def within(self, work: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        """The items of ``work`` until the time is up; names that remain go to `skipped`."""
        for name, value in work.items():
            if time.monotonic() - self.begin > self.seconds:
                self.skipped.append(name)
            else:
                yield name, value
                release()


def release() -> None:
    """Returns unused memory to the GPU, so that the next shape finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _timing(samples: Sequence[float], output: Tensor) -> Timing:
    return Timing(*summarize(samples), output)


def _time_on_cpu(calls: Sequence[Call]) -> Timing:
    samples, output = [], torch.empty(0)
    for call in [*calls[:1], *calls]:
        begin = time.perf_counter()
        output = call()
        samples.append((time.perf_counter() - begin) * 1e6)
    return _timing(samples, output)


@triton.jit
def _read(source, sink, block: tl.constexpr, steps: tl.constexpr):
    """Sums int32; the sum is stored only where it is what it never is, so all of it is read."""
    begin = tl.program_id(0).to(tl.int64) * block * steps
    offsets = tl.arange(0, block)
    total = tl.zeros([block], tl.int32)
    for step in tl.static_range(steps):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(source + begin + step * block + offsets)
    if tl.sum(total) == -1:
        tl.store(sink, 1)
