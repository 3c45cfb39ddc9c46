"""Tiny models, and what they answer in Transformers with `OscarCache`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.config import PAGE_TOKENS

COMPACT = OscarConfig.compact()

VOCABULARY = 384

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(head_dim=64, **_SIZES),
    "qwen3": Qwen3Config(head_dim=128, **_SIZES),
    "shallow": LlamaConfig(head_dim=64, **{**_SIZES, "num_hidden_layers": 1}),
    "mistral": MistralConfig(head_dim=32, sliding_window=None, **_SIZES),
    "sliding": MistralConfig(head_dim=32, sliding_window=64, **_SIZES),
}


def save_model(family: str, folder: Path) -> Path:
    """Writes random weights of ``family`` to ``folder``, unless they are there."""
    path = folder / family
    if not path.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[family]).float().save_pretrained(path)
    return path


@cache
def load_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="oscar", dtype=dtype)
    return model.eval()


@torch.inference_mode()
def log_probs(
    path: Path, config: OscarConfig, tokens: list[int], model: PreTrainedModel | None = None
) -> torch.Tensor:
    """Log-probabilities ``[tokens, vocabulary]`` of what comes after each of ``tokens``.

    They are read with an `OscarCache` in blocks of 128, so that a block sees itself exactly and
    earlier ones packed, as in the engine.
    """
    model = model or load_model(path)
    cache = OscarCache(model.config, replace(config, recent_tokens=0))
    blocks = torch.tensor(tokens).split(PAGE_TOKENS)
    logits = [model(block[None], past_key_values=cache).logits[0] for block in blocks]
    return torch.cat(logits).log_softmax(-1)


def assert_greedy(
    path: Path,
    prompts: list[list[int]],
    answers: list[list[int]],
    config: OscarConfig = COMPACT,
) -> None:
    """Every token of ``answers`` is the most likely one after what comes before it.

    Or as likely: rounding in the seventh digit can move one code of a page to its neighbour, and
    log-probabilities with it by about 0.01. Among some thousand tokens one may stand so close to
    another.
    """
    assert answers
    assert all(answers)
    tokens = ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        read = log_probs(path, config, prompt + answer)[len(prompt) - 1 : -1]
        chosen = read.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        behind = read.amax(1) - chosen
        assert behind.max() < 0.05, f"{answer} after {prompt[-5:]}: behind by {behind.tolist()}"
        tokens += len(answer)
        ties += int(behind.count_nonzero())
    assert ties <= 1 + tokens // 2000
