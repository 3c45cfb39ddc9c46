"""Training of small models by the clock, and how they are measured and exported."""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from windows import BOS, BOS_ID, TrainingWindows

COMPILATION_STEPS = 3
"""First steps, slow while the model compiles, that do not count against the minutes."""
EVALUATIONS = 5
"""Points of a run's curve, evenly spread. They do not count, either."""


@dataclass(frozen=True)
class Settings:
    """How long and how to train; ``steps`` replaces ``minutes`` when it is not zero."""

    minutes: float
    steps: int
    device: str
    batch_size: int
    learning_rate: float
    weight_decay: float
    dropout: float
    workers: int
    seed: int
    first_token: float | None = None
    warmup_share: float = 0.04
    adam_betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0


def weighted_loss(
    logits: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Next-token cross-entropy, averaged by the weight of the predicted token."""
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    target_weights = weights[:, 1:].flatten()
    return (losses * target_weights).sum() / target_weights.sum()


def excess_of_first_token(
    model: PreTrainedModel, tokens: torch.Tensor, wanted: float
) -> torch.Tensor:
    """By how much the first token's keys and values exceed ``wanted``, mean of layers and heads.

    Args:
        model: any causal model.
        tokens: int ``[B, T]``; the first token has the same states however much follows.
        wanted: its norm over the other tokens' root mean square. Norms below that are as good.
    """
    ratios = []
    for layer in model(tokens, use_cache=True).past_key_values.layers:
        for states in (layer.keys, layer.values):
            squares = states.float().square().sum(-1)
            ratios.append((squares[..., 0] / squares[..., 1:].mean(-1).detach()).flatten())
    return torch.relu(torch.cat(ratios).sqrt() - wanted).mean()


def wanted_first_token(progress: float, final: float) -> float:
    """From 1, until half of the training has let sinks form, down to ``final`` at nine tenths:
    gradually, so that queries can grow as the key they look for shrinks."""
    return 1 + (final - 1) * min(1.0, max(0.0, (progress - 0.5) / 0.4))


def learning_rate_factor(progress: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine from 1 to 0; ``progress`` runs from 0 to 1."""
    if progress < warmup_share:
        return progress / warmup_share
    decayed = min(1.0, (progress - warmup_share) / (1 - warmup_share))
    return 0.5 * (1 + math.cos(math.pi * decayed))


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices, not the norms' gains."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        fused=settings.device == "cuda",
    )


def train(
    model: PreTrainedModel,
    windows: TrainingWindows,
    held_out: dict[str, np.ndarray],
    settings: Settings,
) -> dict:
    """Train in place and return a record of the run: steps, minutes, tokens and a curve."""
    on_cuda = settings.device == "cuda"
    autocast = torch.autocast(settings.device, dtype=torch.bfloat16, enabled=on_cuda)
    add_training_dropout(model, settings.dropout)
    compute_loss = weighted_loss
    if on_cuda:
        torch.set_float32_matmul_precision("high")
        for layer in cast(Any, model.base_model).layers:  # compiled once, shared by all layers
            layer.compile()
        compute_loss = torch.compile(weighted_loss)
    optimizer = make_optimizer(model, settings)
    batches = iter(
        DataLoader(
            windows,
            batch_size=settings.batch_size,
            num_workers=settings.workers,
            pin_memory=on_cuda,
            prefetch_factor=8 if settings.workers else None,
        )
    )
    model.train()
    curve: list[dict] = []
    evaluation_time = 0.0
    next_evaluation = 1 / EVALUATIONS
    step, progress, elapsed, started = 0, 0.0, 0.0, time.perf_counter()
    while progress < 1.0:
        factor = learning_rate_factor(progress, settings.warmup_share)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        tokens, weights = (t.to(settings.device, non_blocking=True) for t in next(batches))
        with autocast:
            loss = compute_loss(model(tokens, use_cache=False).logits, tokens, weights)
            objective = loss
            if settings.first_token is not None:
                wanted = wanted_first_token(progress, settings.first_token)
                with torch.compiler.set_stance("force_eager"):
                    excess = excess_of_first_token(model, tokens[:1, :64], wanted)
                objective = loss + excess
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step <= COMPILATION_STEPS:  # the clock starts once everything is compiled
            loss.item()
            started, evaluation_time = time.perf_counter(), 0.0
        elif step % 10 == 0:
            loss.item()  # keeps the host in step with the device, so that the clock is true
        elapsed = time.perf_counter() - started - evaluation_time
        progress = step / settings.steps if settings.steps else elapsed / 60 / settings.minutes
        if progress >= next_evaluation or progress >= 1.0:
            evaluation_started = time.perf_counter()
            with autocast, torch.compiler.set_stance("force_eager"):
                scores = evaluate(model, held_out)
            point = {
                "minutes": round(elapsed / 60, 3),
                "step": step,
                "training_loss": round(loss.item(), 4),
                "held_out_perplexity": scores["perplexity"],
                "recall": scores["recall"],
            }
            curve.append(point)
            typer.echo(json.dumps(point))
            next_evaluation += 1 / EVALUATIONS
            evaluation_time += time.perf_counter() - evaluation_started
    return {
        "minutes": round(elapsed / 60, 3),
        "steps": step,
        "tokens_seen": step * settings.batch_size * windows.maker.length,
        "curve": curve,
    }


def add_training_dropout(model: PreTrainedModel, rate: float) -> None:
    """Drop out what each block adds to the residual stream (the models have no such knob)."""

    def drop(module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_hook(drop)


def export_model(model: PreTrainedModel, output: Path) -> None:
    """Write bfloat16 weights and configurations for ``from_pretrained``."""
    model.generation_config.pad_token_id = BOS_ID
    torch.nn.Module.to(model, "cpu", torch.bfloat16)
    model.save_pretrained(output)


def load_exported(folder: Path, device: str) -> PreTrainedModel:
    """Load an exported model's bfloat16 weights as float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    return model


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_out: dict[str, np.ndarray], batch: int = 4) -> dict:
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


def hardware(device: str) -> str:
    """Name the accelerator, or the processor family."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_tokenizer(tokenizer: Tokenizer, length: int, output: Path) -> None:
    """Write it for ``from_pretrained``; ``<bos>`` ends a text as well."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=length
    ).save_pretrained(output)
