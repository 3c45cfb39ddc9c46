"""``oscar-kv diagnose``: what makes a model hard to quantize, and which preset it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from oscar_kv.progress import progress_display

CONTINUED = 128
"""The last tokens of a text without pictures: not part of the prompt, but what presets have to
predict. Behind pictures they predict what the model says."""


def diagnose(
    model: Annotated[
        str | None, typer.Option(help="Folder or id of a causal model. The bundled one if omitted.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file to measure on. Python code if omitted.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How much of it to read at most.")] = 2048,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture to put before the text; repeatable. For models that see."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, its pictures and JSON.")] = Path(
        "diagnosis"
    ),
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else; files are written, too.")
    ] = False,
) -> None:
    """Measure what makes a model's KV cache hard to quantize, and recommend a preset.

    Examples:

    \b
      oscar-kv diagnose --model MODEL --text question.txt
      oscar-kv diagnose --model MODEL --text question.txt --json > found.json
      oscar-kv diagnose --model MODEL --image photo.jpg --text question.txt
    """
    from oscar_kv.demo import MODEL
    from oscar_kv.evaluation import diagnose_report as reporting
    from oscar_kv.evaluation.diagnose import SMALLEST
    from oscar_kv.evaluation.diagnose import diagnose as run
    from oscar_kv.evaluation.subject import read_text
    from oscar_kv.generation import load, quiet

    content = read_text(text or MODEL / "prompt.txt")
    quiet()
    with progress_display() as progress:
        progress.add_task(f"loading {model or MODEL}", total=None)
        loaded = load(model or MODEL, dtype, device, images=bool(image))
    config = loaded.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or tokens
    ids = loaded.encode(content)[:, : min(tokens, limit)]
    if image:
        inputs, continuation = _with_pictures(loaded, ids, image), None
        if (length := inputs["input_ids"].shape[1]) > limit:
            raise ValueError(
                f"{length} tokens with the pictures: this model takes {limit}; ask for fewer "
                "with --tokens"
            )
    else:
        inputs, continuation = {"input_ids": ids[:, :-CONTINUED]}, ids[:, -CONTINUED:]
        if ids.shape[1] < SMALLEST + CONTINUED:
            raise ValueError(
                f"{ids.shape[1]} tokens of text: expected at least {SMALLEST + CONTINUED}, of "
                f"which the last {CONTINUED} are predicted"
            )
    with progress_display() as progress:
        progress.add_task(f"measuring on {inputs['input_ids'].shape[1]:,} tokens", total=None)
        found = run(loaded.model, inputs, continuation, name=Path(model or MODEL).name)
        files = reporting.write(found, out)
    if not reporting.can_draw():
        print("no pictures: they need matplotlib, pip install 'oscar-kv[plot]'", file=sys.stderr)
    if as_json:
        return print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    console = Console(highlight=False)
    for line in reporting.findings(found):
        console.print(f"- {line}", markup=False)
    for table in reporting.tables(found):
        console.print(_drawn(table))
    chosen = found.recommendation
    console.print(f"Recommended: {chosen.preset or 'no preset'}. {chosen.reason}", markup=False)
    console.print(f"{files[-1]}", markup=False, soft_wrap=True)


def _with_pictures(loaded: Any, ids: Any, paths: list[Path]) -> Any:
    """What the processor makes of pictures and the text ``ids`` ``[1, T]`` behind them."""
    from PIL import Image

    text = loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
    processor = loaded.processor
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in paths), {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
    elif hasattr(processor, "image_token"):
        text = processor.image_token * len(paths) + text
    else:
        raise ValueError("this processor does not say where pictures go: use Python's diagnose")
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return processor(text=[text], images=[pictures], return_tensors="pt").to(loaded.model.device)


def _drawn(table: Any) -> Table:
    title, header, rows = table
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE)
    for number, name in enumerate(header):
        drawn.add_column(name, justify="right" if number else "left")
    for cells in rows:
        drawn.add_row(*cells)
    return drawn
