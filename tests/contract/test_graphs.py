"""What a CUDA graph of a decode step rests on, with vLLM's configuration and inputs and ours.

Of both versions: ``make test-vllm`` runs this file beside each. No GPU is needed: a graph is what a
step does with the metadata of the one that was captured, while memory changes underneath.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.attn_utils import get_attn_cg_support
from vllm.v1.worker.utils import AttentionGroup

import oscar_kv

MODEL = Path(oscar_kv.__file__).parent / "models" / "demo"
CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
REQUESTS, LONGEST = 4, 512
LAYER = "model.layers.0.attn"


@pytest.fixture(autouse=True, scope="module")
def _plugins() -> None:
    load_general_plugins()


def configuration(drafts: int) -> VllmConfig:
    speculation = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2}
    return EngineArgs(
        str(MODEL),
        attention_backend="OSCAR_KV",
        block_size=128,
        dtype="float32",
        max_model_len=LONGEST,
        max_num_seqs=REQUESTS,
        speculative_config=speculation if drafts else None,
    ).create_engine_config()


class Runner:
    """vLLM's side of a layer: what it keeps in one place, and fills in for every step."""

    def __init__(self, drafts: int) -> None:
        self.config = configuration(drafts)
        backend: Any = AttentionBackendEnum["OSCAR_KV"].get_class()
        pages = backend.customize_spec(
            FullAttentionSpec(
                block_size=128, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32
            )
        )
        with set_current_vllm_config(self.config):
            self.layer = backend.get_impl_cls()(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS)
            layers: Any = self.config.compilation_config.static_forward_context
            layers[LAYER] = SimpleNamespace(impl=self.layer)
            self.layer.process_weights_after_loading(torch.float32)
        recent = self.layer.recent
        self.caches = [
            (backend, LAYER, pages),
            (recent.get_attn_backend(), recent.name, recent.spec),
        ]
        self.groups = self.new_groups()

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self.begins, self.begins_cpu = numbers(REQUESTS + 1), numbers(REQUESTS + 1)
        self.lengths = numbers(REQUESTS)
        ring_blocks = recent.spec.blocks_per_request
        self.tables = [numbers(REQUESTS, LONGEST // 128), numbers(REQUESTS, ring_blocks)]
        torch.manual_seed(0)
        self.owned = [
            (1 + torch.randperm(table.numel())).int().view_as(table) for table in self.tables
        ]
        self.computed = [0] * REQUESTS
        spec = recent.spec
        self.pages = torch.zeros(
            (1 + self.tables[0].numel(), KV_HEADS, 128, pages.state_content_bytes),
            dtype=torch.uint8,
        )
        recent.kv_cache = torch.zeros(
            (1 + self.tables[1].numel(), KV_HEADS, spec.block_size, 2 * HEAD_DIM)
        )

    def new_groups(self) -> list[AttentionGroup]:
        """The two caches of a layer, with metadata builders that have built nothing yet."""
        groups = [
            AttentionGroup(backend, [name], spec, number)
            for number, (backend, name, spec) in enumerate(self.caches)
        ]
        with set_current_vllm_config(self.config):
            for group in groups:
                group.create_metadata_builders(self.config, CPU)
        return groups

    def fill(self, chunks: dict[int, int], padded: int) -> None:
        """The inputs of a step: so many tokens of these requests, and requests without any."""
        counts = torch.tensor([*chunks.values(), *[0] * padded], dtype=torch.int32)
        self.begins[1 : len(counts) + 1] = counts.cumsum(0)
        self.begins[len(counts) + 1 :] = int(counts.sum())
        self.begins_cpu.copy_(self.begins)
        self.lengths.zero_()
        for row, (request, count) in enumerate(chunks.items()):
            self.lengths[row] = self.computed[request] + count
            for table, owned in zip(self.tables, self.owned):
                table[row] = owned[request]
        for table in self.tables:
            table[len(chunks) :] = 0

    def metadata(
        self,
        requests: int,
        tokens: int,
        *,
        groups: list[AttentionGroup] | None = None,
        capturing: bool = False,
    ) -> dict[str, Any]:
        counts = self.begins_cpu[: requests + 1].diff()
        found = {}
        for group, table in zip(groups or self.groups, self.tables):
            common = CommonAttentionMetadata(
                query_start_loc=self.begins[: requests + 1],
                query_start_loc_cpu=self.begins_cpu[: requests + 1],
                seq_lens=self.lengths[:requests],
                num_reqs=requests,
                num_actual_tokens=tokens,
                max_query_len=int(counts.max()),
                max_seq_len=LONGEST if capturing else int(self.lengths.max()),
                block_table_tensor=table[:requests],
                slot_mapping=torch.full((tokens,), -1),
            )
            build = (
                group.build_metadata_for_cudagraph_capture if capturing else group.build_metadata
            )
            found[group.layer_names[0]] = build(common)
        return found

    def forward(self, metadata: dict[str, Any], states: list[Tensor]) -> Tensor:
        query = states[0]
        output = torch.zeros_like(query)
        with set_forward_context(metadata, self.config):
            self.layer.forward(None, *states, self.pages, metadata[LAYER], output)
        return output

    def memory(self) -> list[Tensor]:
        return [self.pages, self.layer.recent.kv_cache]


def states(tokens: int) -> list[Tensor]:
    return [torch.randn(tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


@dataclass
class Step:
    chunks: dict[int, int]
    metadata: dict[str, Any]
    states: list[Tensor]


def decode_steps(runner: Runner, tokens: int) -> Iterator[Step]:
    """After prompts, steps of up to three requests in a graph of four; the metadata is the first
    one's, and that of each is built."""
    prompts = {0: 125, 1: 300, 2: 7}
    runner.fill(prompts, 0)
    total = sum(prompts.values())
    runner.forward(runner.metadata(3, total), states(total))
    for request, count in prompts.items():
        runner.computed[request] = count
    runner.fill(dict.fromkeys(range(4), tokens), 0)
    captured = runner.metadata(4, 4 * tokens, capturing=True)
    for requests in ([0, 1, 2], [2, 0], [1], [2, 1, 0], [0, 2], [1, 2]) * 3:
        chunks = dict.fromkeys(requests, tokens)
        runner.fill(chunks, 4 - len(chunks))
        built = runner.metadata(4, 4 * tokens)
        assert places(built) == places(captured)
        yield Step(chunks, captured, states(4 * tokens))
        for request in requests:
            runner.computed[request] += tokens


def places(value: Any) -> Any:
    """Where all tensors of a step's metadata lie, and everything else of it."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride()
    if isinstance(value, dict):
        return {name: places(x) for name, x in value.items()}
    if isinstance(value, list):
        return [places(x) for x in value]
    if is_dataclass(value):
        return [places(getattr(value, field.name)) for field in fields(value)]
    assert isinstance(value, (int, float, str, bool, type(None)))
    return value


@pytest.mark.parametrize("tokens", [1, 4])
def test_replayed_metadata(tokens: int) -> None:
    """A graph answers as a step does whose metadata is built for it alone, without padding."""
    torch.manual_seed(0)
    runner = Runner(tokens - 1)
    lengths = set()
    for step in decode_steps(runner, tokens):
        lengths.add(tuple(step.metadata[LAYER].groups[0].tail_lengths.tolist()))
        count, before = tokens * len(step.chunks), [x.clone() for x in runner.memory()]
        replayed = runner.forward(step.metadata, step.states)
        after = [x.clone() for x in runner.memory()]
        for memory, old in zip(runner.memory(), before):
            memory.copy_(old)
        fresh = runner.metadata(len(step.chunks), count, groups=runner.new_groups())
        wanted = runner.forward(fresh, [x[:count] for x in step.states])
        assert replayed[:count].isfinite().all()
        torch.testing.assert_close(replayed[:count], wanted, atol=2e-6, rtol=1e-5)
        for memory, new in zip(runner.memory(), after):
            assert torch.equal(memory[1:], new[1:])  # block 0 is nobody's
    assert len(lengths) > 15


def test_requests_that_fill_up_a_graph_change_nothing() -> None:
    """Whatever is in their places."""
    torch.manual_seed(0)
    runner = Runner(0)
    for step in decode_steps(runner, 1):
        count, before = len(step.chunks), [x.clone() for x in runner.memory()]
        wanted = runner.forward(step.metadata, step.states)
        after = [x.clone() for x in runner.memory()]
        for memory, old in zip(runner.memory(), before):
            memory.copy_(old)
        for x in step.states:
            x[count:] = 1e4
        found = runner.forward(step.metadata, step.states)
        assert torch.equal(found[:count], wanted[:count])
        for memory, new in zip(runner.memory(), after):
            assert torch.equal(memory[1:], new[1:])


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_dispatcher_chooses_full_graphs(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(tokens - 1)
    groups = [[group] for group in runner.groups]
    support = get_attn_cg_support(groups, runner.config)
    assert support.min_cg_support is AttentionCGSupport.NEVER  # the CPU has no kernels
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    runner.config.device_config.device = torch.device("cuda")
    support = get_attn_cg_support(groups, runner.config)
    assert support.min_cg_support is AttentionCGSupport.UNIFORM_BATCH
    compilation = runner.config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE  # as by default on a GPU
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.splitting_ops = list(compilation._attention_ops)
    compilation.cudagraph_capture_sizes = [tokens, 2 * tokens, 4 * tokens]
    compilation.max_cudagraph_capture_size = 4 * tokens
    mode = compilation.resolve_cudagraph_mode_and_sizes(
        support.min_cg_support, support.min_cg_attn_backend, tokens
    )
    assert mode is CUDAGraphMode.FULL_AND_PIECEWISE
    dispatcher = CudagraphDispatcher(runner.config)
    dispatcher.initialize_cudagraph_keys(mode, tokens)
    chosen, batch = dispatcher.dispatch(3 * tokens, uniform_decode=True)
    assert (chosen, batch.num_tokens, batch.num_reqs) == (CUDAGraphMode.FULL, 4 * tokens, 4)
    chosen, _ = dispatcher.dispatch(3 * tokens, uniform_decode=False)
    assert chosen is CUDAGraphMode.PIECEWISE
