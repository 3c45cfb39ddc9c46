"""Whatever the scheduler does, the engine answers as `OscarCache` in Transformers does."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import REHEARSED, answers, counter, engine, prompt, sampling
from reference import COMPACT, assert_greedy, log_probs, save_model
from vllm import LLM

from oscar_kv import OscarConfig
from oscar_kv.planner import ModelShape


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llm(llama: Path) -> Iterator[LLM]:
    with engine(llama) as started:
        yield started


def test_prompts_of_all_lengths_in_chunks(llm: LLM, llama: Path) -> None:
    """200 tokens a step: long prompts come in chunks, beside requests that already answer."""
    prompts = [prompt(length, length) for length in (1, 100, 127, 128, 129, 255, 300, 513)]
    found = answers(llm, prompts, 40)
    assert_greedy(llama, prompts, found)


def test_answers_that_fill_blocks(llm: LLM, llama: Path) -> None:
    prompts = [prompt(1, 60), prompt(2, 130)]
    assert_greedy(llama, prompts, answers(llm, prompts, 300))


def test_shared_prefixes(llm: LLM, llama: Path) -> None:
    document = prompt(3, 400)
    prompts = [document + prompt(seed, 10 * seed) for seed in (4, 5, 6)]
    for tokens in prompts:
        assert_greedy(llama, [tokens], answers(llm, [tokens], 20))
    (again,) = llm.generate([{"prompt_token_ids": prompts[0]}], sampling(20), use_tqdm=False)
    assert again.num_cached_tokens == 384
    assert_greedy(llama, prompts[:1], [list(again.outputs[0].token_ids)])


def test_parallel_samples(llm: LLM, llama: Path) -> None:
    """Samples of one prompt share its pages and diverge; each token's probability is as in
    Transformers."""
    tokens = prompt(7, 250)
    options = sampling(20, n=4, temperature=1.0, logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], options, use_tqdm=False)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    for sample in output.outputs:
        sampled = list(sample.token_ids)
        expected = log_probs(llama, COMPACT, tokens + sampled)[len(tokens) - 1 : -1]
        expected = expected.gather(1, torch.tensor(sampled)[:, None]).squeeze(1)
        found = [step[token].logprob for step, token in zip(sample.logprobs, sampled)]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0.0)


def test_an_aborted_request_leaves_the_others_alone(llm: LLM, llama: Path) -> None:
    running = llm.llm_engine
    prompts = {str(seed): prompt(seed, 90 + 30 * seed) for seed in range(6)}
    for name, tokens in prompts.items():
        running.add_request(name, {"prompt_token_ids": tokens}, sampling(60))
    found, steps = {}, 0
    while running.has_unfinished_requests():
        for output in running.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 12:
            running.abort_request(["1", "4"])
            running.add_request("late", {"prompt_token_ids": prompts["4"]}, sampling(60))
    assert sorted(found) == ["0", "2", "3", "5", "late"]
    prompts["late"] = prompts["4"]
    assert_greedy(llama, [prompts[name] for name in found], list(found.values()))


def test_memory_is_measured_with_a_prompt(llm: LLM, llama: Path) -> None:
    """vLLM's profiling run attends to nothing of ours, but needs what a full step will need."""
    tokens = prompt(9, 300)
    before = answers(llm, [tokens], 10)
    llm.collective_rpc(lambda worker: worker.model_runner.profile_run())
    assert answers(llm, [tokens], 10) == before


def test_preempted_requests_are_computed_again(llama: Path) -> None:
    """A pool too small for all: requests lose their blocks, and later get others."""
    prompts = [prompt(seed, 60 + 9 * seed) for seed in range(6)]
    with engine(llama, num_gpu_blocks_override=106) as llm:
        found = answers(llm, prompts, 200)
        assert counter(llm, "num_preemptions") > 0
    assert_greedy(llama, prompts, found)


@pytest.mark.parametrize(
    ("family", "backend", "config"),
    [
        ("qwen3", "OSCAR_KV_QUALITY", OscarConfig.quality()),
        ("mistral", "OSCAR_KV_HIGH", OscarConfig.high()),
    ],
)
def test_families_and_presets(
    family: str, backend: str, config: OscarConfig, tmp_path: Path
) -> None:
    path = save_model(family, tmp_path)
    prompts = [prompt(length, length) for length in (20, 150, 390)]
    with engine(path, attention_backend=backend) as llm:
        found = answers(llm, prompts, 120)
    assert_greedy(path, prompts, found, config)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        # Which makes room for what stages send each other.
        {"pipeline_parallel_size": 2, **REHEARSED},
    ],
    ids=["tensors", "pipeline"],
)
def test_two_processes(options: dict[str, Any], llama: Path) -> None:
    """With one KV head of every layer each, or with one layer each."""
    prompts = [prompt(length, length) for length in (20, 150, 390)]
    with engine(llama, distributed_executor_backend="mp", **options) as llm:
        found = answers(llm, prompts, 60)
    assert_greedy(llama, prompts, found)


def test_seven_times_the_tokens_in_the_same_memory(tmp_path: Path) -> None:
    """As vLLM counts them: the exact tokens of running requests are among what is paid for."""
    path = save_model("qwen3", tmp_path)
    options = {
        "dtype": "bfloat16",
        "hf_overrides": {"max_position_embeddings": 65536},
        "max_model_len": 65536,
        "kv_cache_memory_bytes": 160 << 20,
    }
    tokens = []
    for backend in (None, "OSCAR_KV"):
        with engine(path, attention_backend=backend, **options) as llm:
            tokens.append(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
    assert tokens[1] > 7 * tokens[0]
    shape = ModelShape.load(str(path))
    planned = [shape.served_tokens(name, 160 << 20, 65536) for name in ("bf16", "compact")]
    assert planned == tokens


def test_triton_kernels_in_the_engine(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU has them, in Triton's interpreter: across the end of a block."""
    monkeypatch.setenv("OSCAR_KV_BACKEND", "triton")
    prompts = [prompt(1, 126), prompt(2, 5)]
    with engine(llama, max_num_seqs=2, max_model_len=256) as llm:
        found = answers(llm, prompts, 5)
    monkeypatch.undo()
    assert_greedy(llama, prompts, found)
