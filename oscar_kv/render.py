"""What the command line shows: tables and panels for a terminal, a picture of a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from oscar_kv.config import FULL_PRECISION, PAGE_TOKENS, OscarConfig
from oscar_kv.demo import CacheResult, Continuation, DemoResult
from oscar_kv.generation import Footprint
from oscar_kv.planner import GIB, LONG_CONTEXT, ModelShape, PlanRow
from oscar_kv.replacing import replacing


def size(nbytes: float) -> str:
    """Bytes in the binary unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"


def cache_summary(
    takes: Footprint, preset: str, dtype: str, long_ratio: float | None, speed: float | None
) -> str:
    """A line about the cache of a continuation: what it takes, and what it saves, now and later.

    Args:
        takes: after the continuation.
        preset: of the cache, or ``FULL_PRECISION``.
        dtype: of the model.
        long_ratio: how many times smaller the cache is at :data:`LONG_CONTEXT` tokens.
        speed: tokens per second.
    """
    rate = "" if speed is None else f"; {speed:.1f} tokens/s"
    cache, allocated = f"KV cache of {takes.tokens:,} tokens", size(takes.allocated)
    if preset == FULL_PRECISION:
        return f"{cache}: {allocated} ({dtype}){rate}"
    if size(takes.used) != allocated:
        allocated = f"{size(takes.used)} in use, {allocated} allocated"
    host = f", {size(takes.on_host)} of it in CPU memory" if takes.on_host else ""
    saved = f"{takes.full_precision / takes.allocated:.2f}x smaller"
    if takes.allocated >= takes.full_precision:
        exact = OscarConfig.preset(preset).recent_tokens
        saved = (
            f"nothing saved yet, because the newest {exact} to {exact + PAGE_TOKENS - 1} tokens "
            f"stay in {dtype}"
        )
    later = ""
    if long_ratio is not None:
        later = f"; at {LONG_CONTEXT // 1024}K tokens {long_ratio:.2f}x smaller (computed)"
    return (
        f"{cache}: {allocated} ({preset}{host}) instead of {size(takes.full_precision)} "
        f"({dtype}): {saved}{later}{rate}"
    )


def prompt_excerpt(prompt: str, tokens: int) -> Panel:
    """The prompt's last lines, preceded by the line that defines the name they ask for."""
    lines = prompt.splitlines()
    shown = lines[-4:]
    asked = re.search(r"(\w+) ==\s*$", prompt)
    defined = [line for line in lines if asked and line.strip().startswith(f"{asked[1]} =")]
    body = Text("\n".join(["...", *defined, "...", *shown]), no_wrap=True, overflow="ellipsis")
    return Panel(body, title=f"prompt: {tokens:,} tokens of Python", title_align="left")


def continuations(made: dict[str, Continuation], dtype: str) -> RenderableType:
    """The continuations side by side; what differs from full precision is highlighted."""
    grid = Table.grid(expand=True)
    panels = []
    for name, text in ((name, one.text) for name, one in made.items()):
        same = _common_prefix(text, made[FULL_PRECISION].text)
        body = Text.assemble(text[:same], (text[same:], "yellow"))
        grid.add_column(ratio=1)
        panels.append(Panel(body, title=_title(name, dtype), height=18))
    grid.add_row(*panels)
    return grid


def continuations_plain(made: dict[str, Continuation], dtype: str) -> str:
    """The continuations one after another."""
    parts = [f"--- {_title(name, dtype)}\n{one.text}" for name, one in made.items()]
    return "\n".join(parts)


def demo_table(result: DemoResult) -> RenderableType:
    """The demo's measurements, a column per cache."""
    full = next(cache for cache in result.caches if cache.name == FULL_PRECISION)

    def perplexity(cache: CacheResult) -> str:
        change = f" ({cache.perplexity / full.perplexity - 1:+.1%})" if cache is not full else ""
        return f"{cache.perplexity:.3f}{change}"

    tokens = result.prompt_tokens + result.new_tokens - 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("KV cache")
    for cache in result.caches:
        table.add_column(_title(cache.name, result.dtype), justify="right", overflow="fold")
    for label, cells in (
        (f"memory, {tokens:,} tokens", [size(c.nbytes) for c in result.caches]),
        ("  times smaller", [f"{c.ratio:.2f}x" for c in result.caches]),
        ("  bits per element", [f"{c.bits_per_element:.2f}" for c in result.caches]),
        (
            "  bits per element, quantized part",
            [_or_dash(c.page_bits_per_element, "{:.2f}") for c in result.caches],
        ),
        (
            f"times smaller at {result.long_context // 1024}K, computed",
            [f"{c.long_context_ratio:.2f}x" for c in result.caches],
        ),
        ("held-out perplexity", [perplexity(c) for c in result.caches]),
        ("values recalled", [f"{c.recall:.1%}" for c in result.caches]),
        ("same most likely token", [f"{c.agreement:.1%}" for c in result.caches]),
        (
            "same continuation as " + _title(FULL_PRECISION, result.dtype),
            [f"{c.same_tokens} of {result.new_tokens}" for c in result.caches],
        ),
        ("tokens/s on this CPU", [_or_dash(c.tokens_per_second, "{:.0f}") for c in result.caches]),
    ):
        table.add_row(label, *cells)
    note = (
        f"Memory is what each cache allocated, the newest tokens in {result.dtype} included. "
        f"Perplexity and most likely token: {result.scored_tokens:,} tokens of "
        f"{result.scored_windows} held-out windows. Recall: {result.recall_answers} five-digit "
        f"values in {result.recall_windows} windows, asked for 1,000 to 2,000 tokens later."
    )
    return Group(table, Text(note, style="dim"))


def plan_table(model: ModelShape, rows: Sequence[PlanRow], context: int, batch: int) -> Group:
    """A plan, a row per cache."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["KV cache", "memory", "bits per element", "times smaller"]
    with_memory = rows[0].longest_context is not None
    if with_memory:
        headings += ["longest context", "tokens in vLLM"]
    for heading in headings:  # folded where the terminal is narrow, for a number cut off is wrong
        justify = "left" if heading == "KV cache" else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        cells = [size(row.nbytes), f"{row.bits_per_element:.2f}", f"{row.ratio:.2f}x"]
        if with_memory:
            cells += [f"{row.longest_context:,}", _or_dash(row.served_tokens, "{:,}")]
        table.add_row(row.method, *cells)
    sequences = "1 sequence" if batch == 1 else f"{batch:,} sequences"
    title = f"{model.name}: {sequences} of {context:,} tokens"
    return Group(Text(title, style="bold"), table, Text(_plan_note(model), style="dim"))


def save_plot(
    model: ModelShape,
    methods: Sequence[str],
    context: int,
    batch: int,
    budget: int | None,
    to: Path,
) -> None:
    """Draws the memory of every cache over the context, up to ``context`` tokens, into a file.

    Raises:
        ImportError: if matplotlib is missing.
        OSError: if the file cannot be written; an earlier one is as it was.
        ValueError: if matplotlib does not know the file's format.
    """
    from matplotlib.figure import Figure

    if not to.suffix:
        raise ValueError(f"{str(to)!r} names no format: expected a name such as {to}.png")

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = sorted({max(1, context * step // 64) for step in range(1, 65)})
    for method in methods:
        sizes = [model.nbytes(method, point, batch) / GIB for point in points]
        dashed = "--" if method in ("bf16", "fp8") else "-"
        axes.plot(points, sizes, dashed, label=f"{method}, {size(sizes[-1] * GIB)}")
    if budget is not None:
        axes.axhline(budget / GIB, color="grey", linestyle=":", label=f"free, {size(budget)}")
    sequences = "one sequence" if batch == 1 else f"{batch:,} sequences"
    axes.set(title=f"KV cache of {model.name}, {sequences}", ylabel="GiB")
    axes.set(xlabel="tokens per sequence", xlim=(0, context), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(to) as part:
        figure.savefig(part, dpi=150)


def _plan_note(model: ModelShape) -> str:
    parts = []
    for layer, count in model.layers:
        kind = "quantized" if layer.quantized else "kept in BF16 by every preset"
        window = "" if layer.window is None else f", window {layer.window:,}"
        heads = f"{layer.num_kv_heads} KV heads of {layer.head_dim}"
        if layer.value_head_dim != layer.head_dim:
            heads += f" (keys) and {layer.value_head_dim} (values)"
        parts.append(f"{count} layers with {heads}{window}: {kind}.")
    if model.uncounted:
        parts.append(
            f"{model.uncounted} layers not counted: linear attention, or another layer's cache."
        )
    if model.max_context:
        parts.append(f"The model states a context of {model.max_context:,} tokens.")
    return " ".join(parts)


def _title(name: str, dtype: str) -> str:
    return dtype if name == FULL_PRECISION else name


def _common_prefix(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
