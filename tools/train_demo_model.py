"""Train the demo model that ships inside the package, and export it with its held-out files.

    python tools/train_demo_model.py --minutes 3.5 --device cuda
    python tools/train_demo_model.py --steps 3 --batch-size 2 --device cpu --output /tmp/demo
    python tools/train_demo_model.py --evaluate-only --device cpu

The schedule is budgeted in wall-clock minutes (or in steps, for debugging): the learning rate
warms up and then follows a cosine down to zero at the end of the budget.
"""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from demo_data import WINDOW, build_prompt, read_sources
from training import (
    Settings,
    evaluate,
    export_model,
    hardware,
    load_exported,
    save_tokenizer,
    train,
    versions,
)
from transformers import LlamaConfig, LlamaForCausalLM
from windows import (
    ANSWER_DIGITS,
    BOS_ID,
    TrainingWindows,
    WindowMaker,
    build_held_out,
    encode_stream,
    train_tokenizer,
)

HELD_OUT_SEED = 2024
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
    held_out_stream = encode_stream(tokenizer, held_out_texts.values())
    held_out, distances = build_held_out(
        WindowMaker(tokenizer, held_out_stream, WINDOW), HELD_OUT_SEED
    )
    typer.echo(f"{len(training_texts)} files, {len(stream)} tokens")
    save_tokenizer(tokenizer, WINDOW, output)
    np.savez_compressed(output / "heldout.npz", allow_pickle=False, **held_out)
    (output / "prompt.txt").write_text(build_prompt(held_out_texts), encoding="utf-8")

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the window workers are forked
    model = build_model(seed)
    torch.nn.Module.to(model, device)
    windows = TrainingWindows(WindowMaker(tokenizer, stream, WINDOW), seed)
    run = train(model, windows, held_out, settings)
    export_model(model, output)

    torch.set_float32_matmul_precision("highest")
    exported = load_exported(output, device)
    record = {
        "settings": asdict(settings),
        "hardware": hardware(device),
        "versions": versions(),
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
