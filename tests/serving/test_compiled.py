"""No step compiles a kernel: the rehearsal before the first one has needed every version of it."""
# pyright: reportMissingImports=false

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import REHEARSED, answers, engine, prompt
from reference import save_model
from triton.runtime.interpreter import InterpretedFunction

from oscar_kv.kernels import triton_decode, triton_extend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@pytest.mark.parametrize(
    ("family", "longest", "budget"),
    [
        ("qwen3", 1920, 200),
        ("llama", 1000, 640),
        ("qwen3", 8000, 2048),
        ("mistral", 100, 300),
    ],
)
def test_steps_need_no_other_versions(
    family: str, longest: int, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of kernels that are not run, as answers mean nothing here."""
    needed: set[Any] = set()
    monkeypatch.setenv("OSCAR_KV_BACKEND", "triton")
    monkeypatch.setattr(
        InterpretedFunction,
        "run",
        lambda self, *args, grid, warmup, **options: needed.add(version(self, args, options)),
    )
    for module in (triton_decode, triton_extend):  # which divide work by the device
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_decode, "shared_memory", lambda device: 228 << 10)
    chance = random.Random(0)
    options = {
        "dtype": "bfloat16",
        "hf_overrides": {"max_position_embeddings": 8192},
        "max_model_len": longest,
        "max_num_batched_tokens": budget,
        "kv_cache_memory_bytes": 256 << 20,
        **REHEARSED,
    }
    with engine(save_model(family, tmp_path), **options) as llm:
        rehearsed = set(needed)
        for _ in range(12):
            count = chance.choice((1, 1, 2, 3, 5, 8))
            lengths = [chance.choice((30, 200, longest)) for _ in range(count)]
            prompts = [prompt(n, chance.randint(1, min(n, longest - 20))) for n in lengths]
            answers(llm, prompts, chance.randint(1, 16))
    assert len({name for name, _ in rehearsed}) > 6
    assert needed == rehearsed


def version(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, Any]:
    """What Triton compiles a kernel for: values of constants, and what it knows of arguments."""
    parameters = inspect.signature(kernel.fn).parameters
    values = dict(zip(parameters, args)) | options
    unknown = set(kernel.kwargs["do_not_specialize"] or ())
    unaligned = unknown | set(kernel.kwargs["do_not_specialize_on_alignment"] or ())

    def known(name: str, value: Any) -> Any:
        if name not in parameters or "constexpr" in str(parameters[name].annotation):
            return repr(value)
        if isinstance(value, tuple):
            return tuple(known(name, one) for one in value)
        if isinstance(value, torch.Tensor):
            return value.dtype, name in unaligned or value.data_ptr() % 16 == 0
        if isinstance(value, int) and name not in unknown:
            return value == 1, value % 16 == 0
        return None if value is None else type(value)

    return kernel.__name__, tuple(sorted((name, known(name, v)) for name, v in values.items()))
