"""The same on a GPU: `pytest tests/serving/test_on_gpu.py` in an environment with vLLM 0.33."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import answers, engine, graphs, prompt
from reference import COMPACT, behind, load_model, log_probs, save_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("options", [{}, graphs(1, 2, 4, 8)], ids=["eager", "graphs"])
def test_answers_as_transformers_does_on_the_cpu(options: dict[str, Any], tmp_path: Path) -> None:
    """By how much its tokens are less likely than the best ones is what bfloat16 makes of it."""
    path = save_model("qwen3", tmp_path)
    prompts = [prompt(length, length) for length in (20, 150, 390, 700)]
    with engine(path, dtype="bfloat16", gpu_memory_utilization=0.05, **options) as llm:
        found = all_behind(path, prompts, answers(llm, prompts, 40))
    rounding = all_behind(path, prompts, [bfloat16_answer(path, tokens, 40) for tokens in prompts])
    # If rounding happens to change no token, one may be as far behind as `assert_greedy` allows.
    assert found.max() < max(0.05, 2 * rounding.max())
    assert found.mean() < max(0.05 / len(found), 2 * rounding.mean())


def test_steps_wait_for_no_compiler(tmp_path: Path) -> None:
    """Whatever number of tokens steps compute, and however long requests are."""
    path = save_model("qwen3", tmp_path)
    chunks = (1, 3, 10, 20, 50, 100)
    prompts = [prompt(n, length + n) for length in (0, 200, 1600) for n in chunks]
    options = {"max_model_len": 2048, "kv_cache_memory_bytes": 256 << 20}
    with engine(path, dtype="bfloat16", **options) as llm:
        started = versions()
        for one in prompts:
            answers(llm, [one], 3)
        answers(llm, prompts, 140)
        assert versions() == started
    assert started["extend_kernel"] > 0


def versions() -> dict[str, int]:
    """How many versions Triton has of every kernel."""
    return {
        name: sum(len(on_device[0]) for on_device in kernel.device_caches.values())
        for module in [m for m in sys.modules if m.startswith("oscar_kv")]
        for name, kernel in vars(sys.modules[module]).items()
        if hasattr(kernel, "device_caches")
    }


def all_behind(path: Path, prompts: list[list[int]], found: list[list[int]]) -> torch.Tensor:
    """:func:`behind` of all answers."""
    return torch.cat([behind(path, *one) for one in zip(prompts, found, strict=True)])


def bfloat16_answer(path: Path, tokens: list[int], count: int) -> list[int]:
    """What Transformers answers in bfloat16, reading the text anew for every token."""
    model = load_model(path, torch.bfloat16)
    text = list(tokens)
    for _ in range(count):
        text.append(int(log_probs(path, COMPACT, text, model)[-1].argmax()))
    return text[len(tokens) :]
