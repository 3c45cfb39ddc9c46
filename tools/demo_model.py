"""The demo model: its architecture, its export, and how it is measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import BOS_ID, WINDOW
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 4096


def build_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model, about 8.9 million float32 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    return LlamaForCausalLM(config)


def add_training_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop out what each block adds to the residual stream (Llama itself has no such knob)."""

    def drop(module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(drop)


def export_model(model: LlamaForCausalLM, output: Path) -> None:
    """Write bfloat16 weights and configurations for ``from_pretrained``."""
    model.generation_config.pad_token_id = BOS_ID
    torch.nn.Module.to(model, "cpu", torch.bfloat16)
    model.save_pretrained(output)


def load_exported(folder: Path, device: str) -> LlamaForCausalLM:
    """Load an exported model's bfloat16 weights as float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    return model


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: dict[str, np.ndarray], batch: int = 4) -> dict:
    """Measure held-out perplexity, and how many recalled values are right in every digit.

    A value counts when each of its digits is the model's first choice given the digits before
    it, which is exactly when greedy decoding would produce it.
    """
    was_training = model.training
    model.eval()

    def logits_of(windows: np.ndarray) -> torch.Tensor:
        return model(torch.from_numpy(windows).to(model.device), use_cache=False).logits.float()

    text = held_out["text"].astype(np.int64)
    total = 0.0
    for start in range(0, len(text), batch):
        rows = text[start : start + batch]
        targets = torch.from_numpy(rows[:, 1:].copy()).to(model.device)
        logits = logits_of(rows)[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    loss = total / (text.shape[0] * (text.shape[1] - 1))

    recall, answers = held_out["recall"].astype(np.int64), held_out["answer_pos"]
    right = 0
    for start in range(0, len(recall), batch):
        rows, positions = recall[start : start + batch], answers[start : start + batch]
        choices = logits_of(rows).argmax(-1).cpu().numpy()
        row = np.arange(len(rows))[:, None, None]
        right += int((choices[row, positions - 1] == rows[row, positions]).all(-1).sum())
    model.train(was_training)
    asked = answers.shape[0] * answers.shape[1]
    return {
        "perplexity": round(math.exp(loss), 4),
        "loss_nats_per_token": round(loss, 4),
        "recall": round(right / asked, 4),
        "recall_right": right,
        "recall_asked": asked,
    }
