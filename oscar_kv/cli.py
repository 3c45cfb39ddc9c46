"""``oscar-kv demo | generate | chat | info | diagnose | eval | report | lm-eval | bench``.

Whatever a user can get wrong ends in one line on stderr and exit code 2. PyTorch and Transformers
are imported by the commands that need them, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from oscar_kv import cli_diagnose, cli_eval, cli_harness
from oscar_kv.config import FULL_PRECISION, PRESETS, OscarConfig
from oscar_kv.progress import progress_display as _progress

app = typer.Typer(
    help="A KV cache in about 2 bits per element.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

BENCHMARKS = ("kernel", "prefill", "model")

CudaGraph = Annotated[
    bool | None,
    typer.Option(help="Run decode steps as a CUDA graph. Wherever possible if omitted."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits: 0, or 2 after an error.

    Args:
        args: the arguments; those of the process if omitted.
    """
    try:
        code = app(args=args, prog_name="oscar-kv", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (ValueError, TypeError, OSError, MemoryError) as error:
        code = _fail(str(error) or type(error).__name__)
    except Exception as error:
        if not hasattr(error, "format_message"):  # that is a usage error
            raise
        code = _fail(error.format_message() + " (see oscar-kv --help)")  # pyright: ignore
    raise SystemExit(code)


@app.command()
def demo(as_json: Json = False) -> None:
    """Continue a prompt with the bundled model and three caches, then compare them."""
    from rich.live import Live

    from oscar_kv.demo import CACHES, NEW_TOKENS, Demo
    from oscar_kv.generation import quiet
    from oscar_kv.render import continuations, continuations_plain, demo_table, prompt_excerpt

    quiet()
    begin = time.perf_counter()
    out = Console()
    live_text = out.is_terminal and not as_json
    with _progress() as progress:
        progress.add_task("loading the model", total=None)
        run = Demo()
    if not as_json:
        out.print(prompt_excerpt(run.prompt, run.prompt_ids.shape[1]))
    if live_text:
        with Live(console=out, refresh_per_second=12) as live:
            made = run.generate(show=lambda m: live.update(continuations(m, run.loaded.dtype)))
    else:
        with _progress() as progress:
            task = progress.add_task(f"generating with {len(CACHES)} caches", total=NEW_TOKENS)
            made = run.generate(show=lambda m: progress.advance(task))
    if not as_json and not live_text:
        out.print(continuations_plain(made, run.loaded.dtype), markup=False, highlight=False)
    with _progress() as progress:
        task = progress.add_task("scoring held-out windows", total=run.evaluation_steps)
        result = run.evaluate(made, progress=lambda steps: progress.advance(task, steps))
    seconds = time.perf_counter() - begin
    if as_json:
        return _print_json({**asdict(result), "seconds": seconds})
    out.print(demo_table(result))
    out.print(f"{seconds:.0f} seconds.", style="dim", highlight=False)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder or Hugging Face id of a causal model.")],
    preset: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}, or {FULL_PRECISION} for no quantization.")
    ] = "compact",
    prompt: Annotated[str | None, typer.Option(help="Text to continue, taken as it is.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file with the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    cuda_graph: CudaGraph = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the quantized pages in CPU memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a quantized cache; text on stdout, the rest on stderr."""
    text = _read_prompt(prompt, prompt_file)
    _check_sampling(preset, temperature)
    if offload and preset == FULL_PRECISION:
        raise ValueError(f"--offload: needs a preset, not {FULL_PRECISION}")

    import torch
    from transformers import TextStreamer

    from oscar_kv import generation
    from oscar_kv.evaluation.quality import make_cache
    from oscar_kv.integrations.transformers import OscarCache
    from oscar_kv.render import size

    loaded = _load(model, preset, dtype, device)
    ids = loaded.encode(text)
    generation.check_length(loaded.model.config, ids.shape[1], max_new_tokens)
    cache = make_cache(loaded.model, preset, offloading=offload)
    streamer = None if as_json else TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    tokens: list[generation.Token] = []
    graph = generation.decode_graph(loaded.model, cache, cuda_graph)
    stream = generation.continuation(
        loaded.model, ids, cache, max_new_tokens, temperature, graph=graph
    )
    with _progress() as progress:
        progress.add_task(f"reading {ids.shape[1]:,} prompt tokens", total=None)
        tokens.append(next(stream))
    # text that appears on the terminal is its own progress
    hidden = streamer is not None and sys.stdout.isatty()
    with contextlib.nullcontext() if hidden else _progress() as progress:
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
    used, full = generation.cache_nbytes(cache), generation.full_precision_nbytes(cache)
    on_host = cache.host_nbytes if isinstance(cache, OscarCache) else 0
    speed = generation.tokens_per_second(tokens)
    if as_json:
        written = loaded.tokenizer.decode([t.id for t in tokens], skip_special_tokens=True)
        return _print_json(
            {
                "model": model,
                "preset": preset,
                "dtype": loaded.dtype,
                "attends_packed": loaded.attends_packed,
                "cuda_graph": graph is not None,
                "text": written,
                "prompt_tokens": ids.shape[1],
                "new_tokens": len(tokens),
                "kv_bytes": used,
                "host_kv_bytes": on_host,
                "full_precision_kv_bytes": full,
                "ratio": full / used,
                "prompt_seconds": tokens[0].seconds,
                "tokens_per_second": speed,
            }
        )
    rate = "" if speed is None else f", {speed:.1f} tokens/s"
    place = f"; {size(on_host)} of it in CPU memory" if offload else ""
    _say(
        f"KV cache of {ids.shape[1] + len(tokens) - 1:,} tokens: {size(used)} ({preset}) instead "
        f"of {size(full)} ({loaded.dtype}), {full / used:.2f}x smaller{rate}{place}"
    )


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Folder or Hugging Face id of a causal model.")],
    preset: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}, or {FULL_PRECISION} for no quantization.")
    ] = "compact",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Per answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    cuda_graph: CudaGraph = None,
) -> None:
    """Talk with a model; the quantized cache is kept from turn to turn."""
    _check_sampling(preset, temperature)

    from oscar_kv import repl
    from oscar_kv.chat import Conversation

    loaded = _load(model, preset, dtype, device)
    conversation = Conversation(loaded, preset, system, cuda_graph=cuda_graph)
    repl.chat(conversation, max_new_tokens, temperature)


@app.command()
def info(
    model: Annotated[str, typer.Option(help="Folder, config.json or Hugging Face id.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset to show; repeatable. All if omitted.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of the GPU: adds the longest context that fits.")
    ] = None,
    weights: Annotated[float, typer.Option(min=0.0, help="GiB of it taken by weights.")] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg, .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Plan KV memory: bytes of BF16, FP8 and each preset, and the longest context that fits."""
    presets = list(dict.fromkeys(preset or PRESETS))
    for name in presets:
        OscarConfig.preset(name)
    if gpu_memory is None and weights:
        raise ValueError("--weights needs --gpu-memory")
    if gpu_memory is not None and not weights < gpu_memory < float("inf"):
        raise ValueError(f"--gpu-memory {gpu_memory:g}: expected more than --weights {weights:g}")

    from oscar_kv.generation import quiet
    from oscar_kv.planner import GIB, ModelShape, plan
    from oscar_kv.render import plan_table, save_plot

    quiet()
    try:
        shape = ModelShape.load(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot plan {model!r}: {error}") from error
    budget = None if gpu_memory is None else int((gpu_memory - weights) * GIB)
    rows = plan(shape, context, batch, presets, budget)
    if plot is not None:
        _save(
            plot, lambda: save_plot(shape, [r.method for r in rows], context, batch, budget, plot)
        )
    if as_json:
        layers = [{**asdict(layer), "count": count} for layer, count in shape.layers]
        return _print_json(
            {
                "model": model,
                "context": context,
                "batch": batch,
                "max_context": shape.max_context,
                "layers": layers,
                "uncounted_layers": shape.uncounted,
                "caches": [asdict(row) for row in rows],
            }
        )
    Console().print(plan_table(shape, rows, context, batch))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"{', '.join(BENCHMARKS)}.")],
    quick: Annotated[bool, typer.Option("--quick", help="The most important third.")] = False,
    as_json: Json = False,
) -> None:
    """Measure this GPU: decode attention, prefill or a whole model, against BF16."""
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}: expected one of {BENCHMARKS}")
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks" / "gpu" / f"{name}.py").is_file():
        raise ValueError(
            "the benchmarks are not part of the installed package: clone the repository, install "
            "it with pip install -e . and run this again"
        )
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "bench needs a CUDA GPU, and torch sees none: run it on a machine with one"
        )
    options = [flag for flag, on in (("--quick", quick), ("--json", as_json)) if on]
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", *options]
    code = subprocess.run(command, cwd=checkout, check=False).returncode
    if code:
        raise typer.Exit(code)


app.command("diagnose")(cli_diagnose.diagnose)
app.command("eval")(cli_eval.evaluate)
app.command("report")(cli_eval.report)
app.command("lm-eval", context_settings=cli_harness.PASSED_ON)(cli_harness.lm_eval)


def _load(model: str, preset: str, dtype: str, device: str) -> Any:
    """The :class:`~oscar_kv.generation.Loaded` model, with a word on stderr if it unpacks."""
    from oscar_kv import generation

    generation.quiet()
    with _progress() as progress:
        progress.add_task(f"loading {model}", total=None)
        loaded = generation.load(model, dtype, device)
    if not loaded.attends_packed and preset != FULL_PRECISION:
        _say("note: this model has attention of its own; it reads dequantized states")
    return loaded


def _check_sampling(preset: str, temperature: float) -> None:
    if preset != FULL_PRECISION and preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {(*PRESETS, FULL_PRECISION)}")
    if not temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a finite number")


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("expected one of --prompt and --prompt-file")
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read {str(prompt_file)!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(prompt_file)!r} is not UTF-8 text") from error
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _save(path: Path, write: Any) -> None:
    try:
        write()
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'oscar-kv[plot]'") from error
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _fail(message: str) -> int:
    _say("error: " + " ".join(message.split()))
    return 2


if __name__ == "__main__":
    main()
