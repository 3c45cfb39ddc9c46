"""Train the demo model that ships inside the package, and export it with its held-out files.

    python tools/train_demo_model.py --minutes 3.5 --device cuda
    python tools/train_demo_model.py --steps 3 --batch-size 2 --device cpu --output /tmp/demo
    python tools/train_demo_model.py --evaluate-only --device cpu

The schedule is budgeted in wall-clock minutes (or in steps, for debugging): the learning rate
warms up and then follows a cosine down to zero at the end of the budget.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from demo_data import (
    ANSWER_DIGITS,
    BOS,
    WINDOW,
    TrainingWindows,
    WindowMaker,
    build_held_out,
    build_prompt,
    encode_stream,
    read_sources,
    train_tokenizer,
)
from demo_model import (
    VOCAB_SIZE,
    add_training_dropout,
    build_model,
    evaluate,
    export_model,
    load_exported,
)
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT_SEED = 2024
COMPILATION_STEPS = 3
"""First steps, slow while the model compiles, that do not count against the minutes."""


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


def learning_rate_factor(progress: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine from 1 to 0; ``progress`` runs from 0 to 1."""
    if progress < warmup_share:
        return progress / warmup_share
    decayed = min(1.0, (progress - warmup_share) / (1 - warmup_share))
    return 0.5 * (1 + math.cos(math.pi * decayed))


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
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
    model: LlamaForCausalLM,
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
        for layer in model.model.layers:  # compiled once, shared by all layers
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
    next_evaluation = 0.1
    step, progress, elapsed, started = 0, 0.0, 0.0, time.perf_counter()
    while progress < 1.0:
        factor = learning_rate_factor(progress, settings.warmup_share)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        tokens, weights = (t.to(settings.device, non_blocking=True) for t in next(batches))
        with autocast:
            loss = compute_loss(model(tokens, use_cache=False).logits, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step <= COMPILATION_STEPS:  # the clock starts once everything is compiled
            loss.item()
            started = time.perf_counter()
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
            next_evaluation += 0.1
            evaluation_time += time.perf_counter() - evaluation_started
    return {
        "minutes": round(elapsed / 60, 3),
        "steps": step,
        "tokens_seen": step * settings.batch_size * WINDOW,
        "curve": curve,
    }


def hardware(device: str) -> str:
    """Name the accelerator, or the processor family."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def main(
    minutes: Annotated[float, typer.Option(help="Wall-clock training budget.")] = 3.5,
    steps: Annotated[int, typer.Option(help="Train for this many steps instead.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    source: Annotated[
        Path | None, typer.Option(help="A Python standard library; default: this Python's own.")
    ] = None,
    source_version: Annotated[
        str | None, typer.Option(help="The Python version of --source, for the record.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Model folder.")] = Path("oscar_kv/models/demo"),
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW weight decay.")] = 0.3,
    dropout: Annotated[float, typer.Option(help="Dropout on the residual branches.")] = 0.15,
    workers: Annotated[int, typer.Option(help="Processes that make windows.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the windows.")] = 0,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Measure the model in --output again.")
    ] = False,
) -> None:
    """Train the demo model and export it, or measure an exported one again."""
    if evaluate_only:
        with np.load(output / "heldout.npz") as arrays:
            held_out = dict(arrays)
        exported = load_exported(output, device)
        typer.echo(json.dumps(evaluate(exported, held_out), indent=2))
        return

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        minutes, steps, device, batch_size, learning_rate, weight_decay, dropout, workers, seed
    )
    source = source or Path(sysconfig.get_path("stdlib"))
    training_texts, held_out_texts = read_sources(source)
    tokenizer = train_tokenizer(training_texts.values(), VOCAB_SIZE)
    stream = encode_stream(tokenizer, training_texts.values())
    held_out, distances = build_held_out(tokenizer, held_out_texts.values(), HELD_OUT_SEED)
    typer.echo(f"{len(training_texts)} files, {len(stream)} tokens")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=WINDOW
    ).save_pretrained(output)
    np.savez_compressed(output / "heldout.npz", allow_pickle=False, **held_out)
    (output / "prompt.txt").write_text(build_prompt(held_out_texts), encoding="utf-8")

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the window workers are forked
    model = build_model(seed)
    torch.nn.Module.to(model, device)
    windows = TrainingWindows(WindowMaker(tokenizer, stream), seed)
    run = train(model, windows, held_out, settings)
    export_model(model, output)

    torch.set_float32_matmul_precision("highest")
    exported = load_exported(output, device)
    record = {
        "settings": asdict(settings),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "data": {
            "standard_library": source_version or platform.python_version(),
            "files": len(training_texts),
            "megabytes": round(sum(map(len, training_texts.values())) / 1e6, 2),
            "tokens": len(stream),
            "held_out_files": sorted(held_out_texts),
        },
        "parameters": exported.num_parameters(),
        "run": run,
        "evaluation": {
            "weights": "bfloat16, evaluated in float32",
            **evaluate(exported, held_out),
            "recall_distance_tokens": {
                "mean": round(float(np.mean(distances)), 1),
                "least": min(distances),
                "most": max(distances),
            },
            "recall_chance_random_digits": 10.0**-ANSWER_DIGITS,
            "recall_chance_random_planted_value": 1 / held_out["answer_pos"].shape[1],
        },
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(record["evaluation"], indent=2))


if __name__ == "__main__":
    typer.run(main)
