"""``oscar-kv generate | chat``: text from a model with a quantized cache."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from oscar_kv.config import FULL_PRECISION, PRESETS
from oscar_kv.progress import loading, progress_display, say
from oscar_kv.user_input import read_standard_input, read_text

Model = Annotated[str, typer.Option(help="Folder or Hugging Face id of a causal model.")]
Preset = Annotated[
    str, typer.Option(help=f"{', '.join(PRESETS)}, or {FULL_PRECISION} for no quantization.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Draw from so many of the most likely tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that make up this share."),
]
Seed = Annotated[int | None, typer.Option(help="The same draws in every run.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
CudaGraph = Annotated[
    bool | None,
    typer.Option(help="Run decode steps as a CUDA graph. Wherever possible if omitted."),
]


def generate(
    model: Model,
    preset: Preset = "compact",
    prompt: Annotated[
        str | None, typer.Option(help="The prompt; - reads it from standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file with the prompt; - is standard input.")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            help="Put the prompt into the model's chat template and have it answered, or continue "
            "it as it is. The former if omitted, where the model has a template."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most to generate.")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cuda_graph: CudaGraph = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the quantized pages in CPU memory.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else (fields: docs/text.md).")
    ] = False,
) -> None:
    """Answer or continue a prompt with a quantized cache.

    The text goes to stdout, everything else to stderr.

    \b
    Examples:
      oscar-kv generate --model Qwen/Qwen3-8B --prompt "What is a KV cache?"
      oscar-kv generate --model Qwen/Qwen3-8B --prompt-file book.txt \\
          --temperature 0.7 --top-p 0.9 --seed 1
      git diff | oscar-kv generate --model ./my-model --prompt - --json
    """
    text = _read_prompt(prompt, prompt_file)
    _check_preset(preset)
    if offload and preset == FULL_PRECISION:
        raise ValueError(f"--offload: needs a preset, not {FULL_PRECISION}")

    import torch
    from transformers import TextStreamer

    from oscar_kv import generation
    from oscar_kv.evaluation.quality import make_cache
    from oscar_kv.planner import LONG_CONTEXT, long_context_ratio
    from oscar_kv.render import cache_summary
    from oscar_kv.sampling import Sampler

    choose = Sampler(temperature, top_k, top_p, seed)
    loaded = _load(model, preset, dtype, device)
    templated = loaded.has_chat_template if chat_template is None else chat_template
    if templated and not loaded.has_chat_template:
        raise ValueError("--chat-template: this model has none")
    if templated:
        ids = loaded.encode_chat([{"role": "user", "content": text}])
        if chat_template is None:
            say("note: answers in the model's chat template; --no-chat-template continues the text")
    else:
        ids = loaded.encode(text)
    generation.check_length(loaded.model.config, ids.shape[1], max_new_tokens)
    most = ids.shape[1] + max_new_tokens
    cache = make_cache(loaded.model, preset, max_tokens=most, offloading=offload)
    graph = generation.decode_graph(loaded.model, cache, cuda_graph)
    streamer = None
    if not as_json:
        streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    tokens: list[generation.Token] = []
    stream = generation.continuation(loaded.model, ids, cache, max_new_tokens, choose, graph=graph)
    with progress_display() as progress:
        progress.add_task(f"reading {ids.shape[1]:,} prompt tokens", total=None)
        tokens.append(next(stream))
    # text that appears on the terminal is its own progress
    hidden = streamer is not None and sys.stdout.isatty()
    with contextlib.nullcontext() if hidden else progress_display() as progress:
        task = progress and progress.add_task("generating", total=max_new_tokens, completed=1)
        while True:
            if streamer is not None:
                streamer.put(torch.tensor([tokens[-1].id]))
            if (token := next(stream, None)) is None:
                break
            tokens.append(token)
            if progress is not None and task is not None:
                progress.advance(task)
    if streamer is not None:
        streamer.end()
    takes, speed = generation.Footprint.of(cache), generation.tokens_per_second(tokens)
    quantized = preset != FULL_PRECISION
    long_ratio = long_context_ratio(loaded.model.config, preset) if quantized else 1.0
    if not as_json:
        return say(cache_summary(takes, preset, loaded.dtype, long_ratio, speed))
    result = {
        "model": model,
        "preset": preset,
        "dtype": loaded.dtype,
        "chat_template": templated,
        "attends_packed": loaded.attends_packed,
        "cuda_graph": graph is not None,
        "text": loaded.tokenizer.decode([t.id for t in tokens], skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(tokens),
        "kv_bytes": takes.allocated,
        "used_kv_bytes": takes.used,
        "host_kv_bytes": takes.on_host,
        "full_precision_kv_bytes": takes.full_precision,
        "ratio": takes.full_precision / takes.allocated,
        "long_context": LONG_CONTEXT,
        "long_context_ratio": long_ratio,
        "prompt_seconds": tokens[0].seconds,
        "tokens_per_second": speed,
    }
    print(json.dumps(result, indent=2))


def chat(
    model: Model,
    preset: Preset = "compact",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    system_file: Annotated[Path | None, typer.Option(help="The same, as a UTF-8 file.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 file to put in front of the first message; repeatable."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most for an answer.")] = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    cuda_graph: CudaGraph = None,
) -> None:
    """Talk with a model; the quantized cache is kept from turn to turn.

    /help lists the commands: documents, saving, taking up again. On a terminal a pasted block is
    one message; from a pipe every line is one.

    \b
    Examples:
      oscar-kv chat --model Qwen/Qwen3-8B
      oscar-kv chat --model Qwen/Qwen3-8B --file report.txt --temperature 0.7
      oscar-kv chat --model Qwen/Qwen3-8B < questions.txt
    """
    _check_preset(preset)
    if system is not None and system_file is not None:
        raise ValueError("expected only one of --system and --system-file")
    if system_file is not None:
        system = read_text(system_file)

    from oscar_kv.chat import Conversation
    from oscar_kv.repl import Chat
    from oscar_kv.sampling import Sampler

    choose = Sampler(temperature, top_k, top_p, seed)
    loaded = _load(model, preset, dtype, device)
    if not loaded.has_chat_template:
        say("note: this model has no chat template: it may continue your text, not answer it")
    conversation = Conversation(loaded, preset, system, cuda_graph=cuda_graph)
    session = Chat(conversation, max_new_tokens, choose)
    for path in file or ():
        session.add_file(path)
    session.run()


def _load(model: str, preset: str, dtype: str, device: str) -> Any:
    """The :class:`~oscar_kv.generation.Loaded` model, and on stderr what to know about it."""
    from oscar_kv import generation
    from oscar_kv.checkpoints import some

    generation.quiet()
    with loading(model):
        loaded = generation.load(model, dtype, device)
    if loaded.unused:
        say(
            f"note: {len(loaded.unused)} weights of the checkpoint are of no use to the model "
            f"that its config.json describes ({some(loaded.unused)})"
        )
    if not loaded.attends_packed and preset != FULL_PRECISION:
        say("note: this model has attention of its own; it reads dequantized states")
    return loaded


def _check_preset(preset: str) -> None:
    if preset != FULL_PRECISION and preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {(*PRESETS, FULL_PRECISION)}")


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("expected one of --prompt and --prompt-file")
    if "-" in (prompt, str(prompt_file)):
        prompt = read_standard_input()
    elif prompt_file is not None:
        prompt = read_text(prompt_file)
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt
