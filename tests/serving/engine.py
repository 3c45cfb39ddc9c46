"""Starting an engine, and asking it."""
# pyright: reportMissingImports=false

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference import VOCABULARY
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

REHEARSED = {
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager", "custom_ops": ["all"]},
}
"""Options: the engine runs the model before it serves. On a CPU it does so only to compile it."""


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[LLM]:
    """An engine in this process, with room for everything unless ``options`` say otherwise."""
    defaults = {
        "attention_backend": "OSCAR_KV",
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 200,
        "kv_cache_memory_bytes": 64 << 20,
        "seed": 0,
    }
    llm = LLM(str(path), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def graphs(*sizes: int) -> dict[str, Any]:
    """Options: decode steps of so many tokens are CUDA graphs."""
    graph = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(sizes)}
    return {"enforce_eager": False, "compilation_config": {"mode": 0, **graph}}


def sampling(count: int, **options: Any) -> SamplingParams:
    defaults = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    return SamplingParams(max_tokens=count, **(defaults | options))


def answers(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What the engine continues ``prompts`` with, all at once."""
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, sampling(count), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(VOCABULARY) for _ in range(length)]


def counter(llm: LLM, name: str) -> int:
    """A counter of vLLM's metrics."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
