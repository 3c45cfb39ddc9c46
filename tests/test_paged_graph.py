"""Decode steps over an engine's pages as a CUDA graph has them: launched as the first one was, over
memory whose contents change.

Without a GPU they are launched anew, with the arguments of the first one: Triton kernels in the
interpreter, CUDA kernels in the emulator.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
from kernel_checks import GPU
from paged_engine import HEAD_DIM, HEADS, DecodeStep, Engine
from torch import Tensor
from torch.overrides import TorchFunctionMode

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.integrations.vllm import torch_rows, triton_rows
from oscar_kv.integrations.vllm.rows import DecodeRows, Rows, group_rows
from oscar_kv.kernels import cuda_decode, dispatch, reference
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.cuda_decode import Plan
from oscar_kv.kernels.cuda_driver import Program
from oscar_kv.storage.paged import PagedSequences

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
needs_compiler = pytest.mark.skipif(
    emulated.COMPILER is None, reason="the emulator of a GPU is compiled by g++"
)


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Memory that kernels are to fill is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def use_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA kernels on this CPU, sharing work as they do where only the device knows lengths."""

    def attend(call: AttentionCall) -> Tensor:
        return emulated.decode(call, Plan(1, 0, 1, streamed=5))

    backend: Any = dispatch.Backend("cuda", "emulated", lambda layout, device: None)
    vars(backend)["operations"] = SimpleNamespace(
        attend=attend, pack_into=emulated.pack_into, unpack=reference.unpack
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (backend, *dispatch.BACKENDS))


def check_steps(
    engine: Engine,
    step: DecodeStep,
    steps: list[dict[int, int]],
    tolerance: float,
    packing: float = 0.0,
) -> None:
    """Some of the requests a time; each token over earlier blocks packed, and its own exactly."""
    found: dict[int, list[Tensor]] = {}
    begins = list(engine.computed)
    for chunks in steps:
        for request, answer in step(chunks).items():
            found.setdefault(request, []).append(answer)
    for request, parts in found.items():
        answers = torch.cat(parts).double()
        expected = engine.expected(request, packing)[begins[request] :]
        error = torch.linalg.vector_norm(answers - expected, dim=-1)
        assert (error <= tolerance * torch.linalg.vector_norm(expected, dim=-1) + 1e-6).all()


def prefilled(tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Engine:
    """Requests of very different lengths, two of them about to complete a page."""
    engine = Engine(3, 400, tokens - 1, device, dtype)
    for request, length in enumerate((126, 3, 255)):
        engine.step({request: length})
    return engine


def few_steps(tokens: int) -> list[dict[int, int]]:
    """They complete pages, and leave places in a batch of four open."""
    return [{0: tokens, 1: tokens, 2: tokens}, {2: tokens, 0: tokens}, {1: tokens, 0: tokens}]


@pytest.mark.parametrize("tokens", [1, 4])
def test_steps_after_the_first(tokens: int) -> None:
    chance = random.Random(tokens)
    engine = prefilled(tokens)
    steps = [
        dict.fromkeys(chance.sample(range(3), chance.randint(1, 3)), tokens) for _ in range(36)
    ]
    check_steps(engine, DecodeStep(engine, 4, tokens), steps, 1e-5)
    assert max(engine.computed) > 256


@pytest.mark.skipif(GPU, reason="in Triton's interpreter")
@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_triton_kernels(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = prefilled(tokens)
    monkeypatch.setenv("OSCAR_KV_BACKEND", "triton")
    check_steps(engine, DecodeStep(engine, 4, tokens), few_steps(tokens), 5e-3)


@pytest.mark.skipif(GPU, reason="in the emulator, and in Triton's interpreter")
@needs_compiler
@pytest.mark.parametrize("tokens", [1, 4])
def test_cuda_kernels(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = prefilled(tokens, torch.float16)
    use_emulator(monkeypatch)
    check_steps(engine, DecodeStep(engine, 4, tokens), few_steps(tokens), 8e-3, packing=0.1)


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 9, 17])
def test_captured_steps(tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for every length; 2 to 34 query rows of a KV head."""
    monkeypatch.setenv("OSCAR_KV_BACKEND", backend)
    chance = random.Random(tokens)
    engine = prefilled(tokens, torch.bfloat16, "cuda")
    step = captured(DecodeStep(engine, 4, tokens))
    steps = [
        dict.fromkeys(chance.sample(range(3), chance.randint(1, 3)), tokens)
        for _ in range(140 // tokens)
    ]
    check_steps(engine, step, steps, 3e-2, packing=0.1)
    assert max(engine.computed) > 256


def captured(step: DecodeStep) -> DecodeStep:
    """The step as a graph: captured as engines do, where no request has any tokens."""
    step.run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    step.run = graph.replay
    return step


@needs_gpu
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    step = DecodeStep(prefilled(1, torch.bfloat16, "cuda"), 4, 1)
    rows = step.load({0: 1, 1: 1, 2: 1})
    step.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.operations.locate(rows, *step.batch[:3])
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WaitsForNothing(TorchFunctionMode):
    """Raises where PyTorch would wait for a device, which on a CPU nothing else tells."""

    WAITS = frozenset(
        {"tolist", "item", "__bool__", "__int__", "__float__", "__index__"}
        | {"nonzero", "argwhere", "masked_select", "unique", "equal", "allclose"}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        if name in ("__getitem__", "__setitem__"):
            by_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in _flat(args[1]))
            assert not by_mask, f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


def _flat(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


@pytest.mark.skipif(GPU, reason="there is a better one on a GPU")
@needs_compiler
@pytest.mark.parametrize("tokens", [1, 3])
def test_no_step_waits_for_the_device(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = prefilled(tokens, torch.float16)
    use_emulator(monkeypatch)
    waits = WaitsForNothing()
    step = DecodeStep(engine, 4, tokens)
    rows = step.load(dict.fromkeys(range(3), tokens))
    with waits:
        step.operations.locate(rows, *step.batch[:3])
        step.run()
    for wait in (lambda x: x.tolist(), int, bool, lambda x: x[x > 0], torch.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), waits:
            wait(rows.page_counts[:1])


@pytest.mark.skipif(GPU, reason="in Triton's interpreter")
@needs_compiler
@pytest.mark.parametrize("tokens", [1, 3])
def test_launches_of_a_layer(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four, or five where queries have to be put in order; PyTorch only sets memory aside."""
    engine = prefilled(tokens, torch.float16)
    use_emulator(monkeypatch)
    step = DecodeStep(engine, 4, tokens)
    step.load(dict.fromkeys(range(3), tokens))
    launched: list[str] = []

    class Launches:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_rows, f"_{name}_kernel")

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    def run(program: Program, *arguments: Any, emulated_run: Any = emulated.run) -> None:
        launched.append(program.name)
        emulated_run(program, *arguments)

    monkeypatch.setattr(emulated, "run", run)
    for name in ("locate", "open", "close"):
        monkeypatch.setattr(triton_rows, f"_{name}_kernel", Launches(name))
    calls = Calls()
    with calls:
        step.run()
    assert launched == ["open", "pack", "decode", "combine", "close"][: 4 if tokens == 1 else 5]
    assert calls.names <= {
        *("new_empty", "empty", "unsqueeze", "contiguous", "is_contiguous", "__getitem__"),
        *("__get__", "__len__", "stride", "size", "storage_offset", "untyped_storage", "data_ptr"),
    }


class Calls(TorchFunctionMode):
    """The functions of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_work_is_divided_without_knowing_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that has no contents cannot be asked."""
    for name, number in (
        ("multiprocessors", 132),
        ("shared_memory", 228 << 10),
        ("block_shared_memory", 227 << 10),
    ):
        monkeypatch.setattr(cuda_decode, name, lambda device, number=number: number)
    empty = partial(torch.empty, device="meta")
    numbers = empty(64, dtype=torch.int32)
    tail = empty(64, HEADS, PAGE_TOKENS, HEAD_DIM, dtype=torch.bfloat16)
    layout = Engine(1, 1).layout
    table = empty(64, 1000, dtype=torch.int32)
    pages = empty(9, HEADS, layout.page_bytes, dtype=torch.uint8)
    sequences = PagedSequences(layout, pages, table, numbers, tail, tail, numbers, numbers, 1000)
    assert cuda_decode.plan(sequences, 0) == Plan(1, 0, 1, streamed=264)


def places(rows: Rows) -> list[tuple[object, ...]]:
    tensors = [x for x in vars(rows).values() if isinstance(x, Tensor)]
    return [(x.data_ptr(), x.shape, x.stride()) for x in tensors]


def test_rows_stay_where_they_are() -> None:
    decoding = DecodeRows(6, 3, 9, torch.device("cpu"))

    def rows(*lengths: int, tokens: int = 0) -> Rows:
        found = decoding.of(lengths, tokens or sum(lengths))
        assert found is not None
        return found

    assert places(rows(1, 1, 1, 0, tokens=4)) == places(rows(1, 1, 1, 1))
    assert places(rows(3, 3, 0, 0)) == places(rows(3, 3, 3, 3))
    assert places(rows(3, 3)) != places(rows(3, 3, 3))
    assert rows(1, 1, 0, tokens=3).in_order
    assert not rows(1, 1, 0).in_order
    assert not rows(1, 0, 1).in_order
    assert not rows(2, 2).in_order
    assert decoding.of([1] * 7, 7) is decoding.of([4], 4) is decoding.of([0, 0], 2) is None
    assert rows(3, 1).requests.tolist() == [0, 0, 1, 1]
    assert rows(3, 1).blocks.tolist() == [0, 1, 0, 1]


@pytest.mark.skipif(GPU, reason="in Triton's interpreter")
@pytest.mark.parametrize(
    "lengths", [[1, 1, 1], [4, 4, 4], [0, 7, 300], [1, 130, 0]], ids=lambda x: "-".join(map(str, x))
)
@pytest.mark.usefixtures("empty_is_nan")
def test_row_kernels_equal_torch(lengths: list[int]) -> None:
    """What is not in use may differ: kernels do not touch it."""
    engine = Engine(3, 900, drafts=3)
    engine.ring.data.normal_()
    engine.computed = [127, 254, 500]
    begins, total, table, ring_table = engine.batch(dict(zip(range(3), lengths)))
    states = engine.states(dict(zip(range(3), lengths)))
    groups = [
        (torch_rows, group_rows(lengths, table.shape[1], torch.device("cpu"))),
        (triton_rows, group_rows(lengths, table.shape[1], torch.device("cpu"))),
    ]
    found: list[list[Any]] = []
    rings = []
    for operations, parts in groups:
        ring = dataclasses.replace(engine.ring, data=engine.ring.data.clone(), table=ring_table)
        output = torch.zeros_like(states[0])
        results: list[Any] = []
        for rows in parts:
            operations.locate(rows, begins, total, table)
            opened = operations.open_rows(rows, *states, ring)
            operations.close_rows(rows, opened[0] + 1, output)
            results.append((rows, *opened))
        found.append([*results, output])
        rings.append(ring.data[1:])
    assert torch.equal(*rings)
    assert torch.equal(found[0].pop(), found[1].pop())
    for one, other in zip(*found):
        wanted, got = vars(one[0]), vars(other[0])
        for name, numbers in wanted.items():
            if isinstance(numbers, Tensor) and name != "block_table":
                assert torch.equal(numbers, got[name]), name
        for row, (tail, old, pages) in enumerate(
            zip(
                *(x.tolist() for x in (one[0].tail_lengths, one[0].old_lengths, one[0].page_counts))
            )
        ):
            assert torch.equal(*(x[0].block_table[row, :pages] for x in (one, other)))
            new = one[0].num_queries - (tail - old)
            assert torch.equal(*(x[1][row, :, new:] for x in (one, other)))
            for states_of in (2, 3):
                assert torch.equal(*(x[states_of][row, :, :tail] for x in (one, other)))
