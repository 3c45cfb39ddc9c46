"""``oscar-kv demo | generate | chat | info | diagnose | eval | report | lm-eval | bench``.

Whatever a user can get wrong ends in one line on stderr and exit code 2. PyTorch and Transformers
are imported by the commands that need them, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from oscar_kv import __version__, cli_diagnose, cli_eval, cli_generate, cli_harness
from oscar_kv.config import PRESETS, OscarConfig
from oscar_kv.progress import progress_display, say

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut options off where the terminal is narrow
)

BENCHMARKS = ("kernel", "prefill", "model")

Json = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else (fields: docs/text.md).")
]


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
        context: Any = getattr(error, "ctx", None)
        command = "oscar-kv" if context is None else context.command_path
        code = _fail(f"{error.format_message()} (see {command} --help)")  # pyright: ignore
    raise SystemExit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"oscar-kv {__version__}")
        raise typer.Exit


@app.callback()
def top_level(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, exit."),
    ] = False,
) -> None:
    """A KV cache in about 2 bits per element.

    \b
    To begin:
      oscar-kv demo                        a bundled model, three caches side by side
      oscar-kv chat --model Qwen/Qwen3-8B  a conversation
      oscar-kv COMMAND -h                  what a command takes, with examples
    """


def demo(as_json: Json = False) -> None:
    """Continue a prompt with the bundled model and three caches, then compare them.

    \b
    Examples:
      oscar-kv demo
      oscar-kv demo --json > demo.json
    """
    from rich.live import Live

    from oscar_kv.demo import CACHES, NEW_TOKENS, Demo
    from oscar_kv.generation import quiet
    from oscar_kv.render import continuations, continuations_plain, demo_table, prompt_excerpt

    quiet()
    begin = time.perf_counter()
    out = Console()
    live_text = out.is_terminal and not as_json
    with progress_display() as progress:
        progress.add_task("loading the model", total=None)
        run = Demo()
    if not as_json:
        out.print(prompt_excerpt(run.prompt, run.prompt_ids.shape[1]))
    if live_text:
        with Live(console=out, refresh_per_second=12) as live:
            made = run.generate(show=lambda m: live.update(continuations(m, run.loaded.dtype)))
    else:
        with progress_display() as progress:
            task = progress.add_task(f"generating with {len(CACHES)} caches", total=NEW_TOKENS)
            made = run.generate(show=lambda m: progress.advance(task))
    if not as_json and not live_text:
        out.print(continuations_plain(made, run.loaded.dtype), markup=False, highlight=False)
    with progress_display() as progress:
        task = progress.add_task("scoring held-out windows", total=run.evaluation_steps)
        result = run.evaluate(made, progress=lambda steps: progress.advance(task, steps))
    seconds = time.perf_counter() - begin
    if as_json:
        return _print_json({**asdict(result), "seconds": seconds})
    out.print(demo_table(result))
    out.print(f"{seconds:.0f} seconds.", style="dim", highlight=False)


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
    """Plan KV memory: bytes of BF16, FP8 and each preset, and the longest context that fits.

    \b
    Examples:
      oscar-kv info --model Qwen/Qwen3-8B
      oscar-kv info --model ./config.json --context 131072 --batch 4
      oscar-kv info --model Qwen/Qwen3-8B --gpu-memory 24 --weights 16 --plot kv.png
    """
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
        try:
            save_plot(shape, [row.method for row in rows], context, batch, budget, plot)
        except ImportError as error:
            raise ValueError("--plot needs matplotlib: pip install 'oscar-kv[plot]'") from error
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


def bench(
    name: Annotated[str, typer.Argument(help=f"{', '.join(BENCHMARKS)}.")],
    quick: Annotated[bool, typer.Option("--quick", help="The most important third.")] = False,
    as_json: Json = False,
) -> None:
    """Measure this GPU: decode attention, prefill or a whole model, against BF16.

    Needs a CUDA GPU and a checkout of the repository.

    \b
    Examples:
      oscar-kv bench kernel --quick
      oscar-kv bench model --json > model.json
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}: expected one of {BENCHMARKS}")
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks" / "gpu" / f"{name}.py").is_file():
        raise ValueError(
            "the benchmarks are not part of the installed package: in a checkout of the "
            f"repository, run python -m oscar_kv bench {name}"
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


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "generate": cli_generate.generate,
    "chat": cli_generate.chat,
    "info": info,
    "diagnose": cli_diagnose.diagnose,
    "eval": cli_eval.evaluate,
    "report": cli_eval.report,
    "lm-eval": cli_harness.lm_eval,
    "bench": bench,
}
for _name, _command in COMMANDS.items():
    _settings = cli_harness.PASSED_ON if _name == "lm-eval" else None
    _summary = inspect.cleandoc(_command.__doc__ or "").partition("\n")[0]  # else cut short
    app.command(_name, short_help=_summary, context_settings=_settings)(_command)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


def _fail(message: str) -> int:
    say("error: " + " ".join(message.split()))
    return 2


if __name__ == "__main__":
    main()
