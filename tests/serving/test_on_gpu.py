"""The same on a GPU: `pytest tests/serving/test_on_gpu.py` in an environment with vLLM 0.33."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import answers, engine, prompt
from reference import COMPACT, log_probs, save_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EAGER: dict[str, Any] = {}
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}


@pytest.mark.parametrize("options", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_answers_as_transformers_does_on_the_cpu(options: dict[str, Any], tmp_path: Path) -> None:
    """In bfloat16 a token may be behind the best one by what rounding makes of its probability."""
    path = save_model("qwen3", tmp_path)
    prompts = [prompt(length, length) for length in (20, 150, 390, 700)]
    with engine(path, dtype="bfloat16", gpu_memory_utilization=0.05, **options) as llm:
        found = answers(llm, prompts, 40)
    behind = []
    for tokens, answer in zip(prompts, found, strict=True):
        read = log_probs(path, COMPACT, tokens + answer)[len(tokens) - 1 : -1]
        behind.append(read.amax(1) - read.gather(1, torch.tensor(answer)[:, None]).squeeze(1))
    assert torch.cat(behind).max() < 0.2
    assert torch.cat(behind).mean() < 0.01
