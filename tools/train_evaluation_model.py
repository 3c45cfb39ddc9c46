"""Train a model to compare KV caches on: 39 M parameters, 4,096 tokens, heads of 128.

    python tools/train_evaluation_model.py --kind llama --minutes 8 --output llama-39m
    python tools/train_evaluation_model.py --kind qwen3 --minutes 8 --output qwen3-39m
    python tools/train_evaluation_model.py --steps 3 --batch-size 1 --device cpu --output /tmp/try

``llama`` has no QK-norm, ``qwen3`` has. Both see ``<bos>`` first in every window and nowhere else.
In large models without QK-norm attention sinks into the first token, whose keys and values are
small: the imbalance that token scaling is for. Within minutes sinks form, but not their small
norms. So for ``llama`` a term of the loss asks for these in the second half of the training, which
``--first-token 0`` leaves out; ``sinks`` in ``training.json`` says what came of it.

They read the code and documentation that the Python installation holds. The folder gets the model,
its tokenizer, ``heldout.npz`` (text of packages never trained on), a window of that to read,
``heldout.txt``, and ``training.json``.
"""

from __future__ import annotations

import json
import os
import sysconfig
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from installation import read_installation
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
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config
from windows import (
    BOS_ID,
    TrainingWindows,
    WindowMaker,
    build_held_out,
    encode_stream,
    train_tokenizer,
)

WINDOW = 4096
VOCAB_SIZE = 8192
MOST_NUMBERS = 3
"""Behind a name that is to be recalled."""
TOKENIZER_SHARE = 8
"""The tokenizer learns from every eighth text."""
HELD_OUT_SEED = 2024


class Kind(str, Enum):
    """What is trained."""

    llama = "llama"
    qwen3 = "qwen3"


def build_model(kind: Kind, seed: int) -> PreTrainedModel:
    """Return the untrained model."""
    torch.manual_seed(seed)
    make = {Kind.llama: LlamaConfig, Kind.qwen3: Qwen3Config}[kind]
    config = make(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def sinks(model: PreTrainedModel, tokens: torch.Tensor) -> list[dict]:
    """What became of ``<bos>`` in every layer, the mean over texts and heads.

    Args:
        model: after training.
        tokens: int ``[B, T]``, ``<bos>`` first.

    Returns:
        Per layer the share of the last half's attention that it gets, in the mean and in the head
        that gives most, and its key's and value's norm over the median one.
    """
    model.set_attn_implementation("eager")
    outputs = model(tokens, use_cache=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    layers = []
    for attention, layer in zip(outputs.attentions, outputs.past_key_values.layers):
        share = attention[:, :, tokens.shape[1] // 2 :, 0].mean((0, 2))
        norms = [states.norm(dim=-1) for states in (layer.keys, layer.values)]
        key, value = (float((n[:, :, 0] / n.median(-1).values).mean()) for n in norms)
        layers.append(
            {
                "attention": round(float(share.mean()), 4),
                "most_attention": round(float(share.max()), 4),
                "key_norm": round(key, 4),
                "value_norm": round(value, 4),
            }
        )
    return layers


def main(
    output: Annotated[Path, typer.Option(help="Model folder.")],
    kind: Annotated[Kind, typer.Option(help="Architecture.")] = Kind.llama,
    minutes: Annotated[float, typer.Option(help="Wall-clock training budget.")] = 8.0,
    steps: Annotated[int, typer.Option(help="Train for this many steps instead.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    source: Annotated[
        list[Path] | None, typer.Option(help="Folders of text; default: this Python's libraries.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW weight decay.")] = 0.1,
    workers: Annotated[int, typer.Option(help="Processes that make windows.")] = 8,
    first_token: Annotated[
        float, typer.Option(help="Norm of the first token's keys and values, over the others'.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the windows.")] = 0,
) -> None:
    """Train one and export it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    settings = Settings(
        minutes,
        steps,
        device,
        batch_size,
        learning_rate,
        weight_decay,
        dropout=0.0,
        workers=workers,
        seed=seed,
        first_token=(first_token or None) if kind is Kind.llama else None,
    )
    roots = source or [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    texts = read_installation(roots)
    tokenizer = train_tokenizer(list(texts.training.values())[::TOKENIZER_SHARE], VOCAB_SIZE)
    stream = encode_stream(tokenizer, texts.training.values(), begin=False)
    held_out_stream = encode_stream(tokenizer, texts.held_out.values(), begin=False)
    held_out, _ = build_held_out(
        WindowMaker(tokenizer, held_out_stream, WINDOW), HELD_OUT_SEED, plain=64, recall=16
    )
    typer.echo(f"{texts.record}, {len(stream)} tokens")
    output.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, WINDOW, output)
    np.savez_compressed(output / "heldout.npz", allow_pickle=False, **held_out)
    (output / "heldout.txt").write_text(tokenizer.decode(held_out["text"][0].tolist()))

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the window workers are forked
    model = build_model(kind, seed)
    torch.nn.Module.to(model, device)
    windows = TrainingWindows(WindowMaker(tokenizer, stream, WINDOW), seed, MOST_NUMBERS)
    run = train(model, windows, held_out, settings)
    export_model(model, output)

    torch.set_float32_matmul_precision("highest")
    exported = load_exported(output, device)
    some = torch.from_numpy(held_out["text"][:4, :1024].astype(np.int64)).to(device)
    record = {
        "kind": kind.value,
        "settings": asdict(settings),
        "hardware": hardware(device),
        "versions": versions(),
        "data": {**texts.record, "tokens": len(stream)},
        "parameters": exported.num_parameters(),
        "run": run,
        "evaluation": evaluate(exported, held_out),
        "sinks": sinks(exported, some),
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps({k: record[k] for k in ("evaluation", "sinks")}, indent=2))


if __name__ == "__main__":
    typer.run(main)
