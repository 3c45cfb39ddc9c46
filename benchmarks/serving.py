"""vLLM under load with every KV cache, at the same memory: throughput, latency, and what fits.

    python -m benchmarks.serving --memory 40 --rates 1,4,16

Needs a machine with a GPU and vLLM. Each cache gets a server of its own with random weights of the
shape of Llama-3.1-8B, the same bytes for its KV cache and the same requests, which arrive as a
Poisson process. Answers of random weights mean nothing; only the time they take does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import record

CACHES: dict[str, list[str]] = {
    "bf16": [],
    "fp8": ["--kv-cache-dtype", "fp8"],
    "turboquant_4bit": ["--kv-cache-dtype", "turboquant_4bit_nc"],
    "turboquant_3bit": ["--kv-cache-dtype", "turboquant_3bit_nc"],
    "oscar_kv": ["--attention-backend", "OSCAR_KV"],
}
"""What a server is started with."""

PLAIN = ("bf16", "fp8")
"""Caches that several of vLLM's attention backends can read."""

SHAPE = Path(__file__).parent / "configs" / "llama_8b.json"
STREAM_INTERVAL = 8
"""Tokens of a message after the first, so that nobody waits for the client."""
WARM_UP = 8
"""Requests before anything is measured: kernels are compiled on first use."""


COLUMNS = {
    "cache": "KV cache",
    "cache_tokens": "tokens",
    "rate": "rate",
    "finished": "finished",
    "most_running": "at a time",
    "answer_tokens_per_second": "tokens/s",
    "first_token_ms": "first (ms)",
    "between_tokens_ms": "between (ms)",
}
"""What is printed of a row."""


@dataclass
class Progress:
    """One request, in seconds from when it was sent."""

    first_token: float = 0.0
    total: float = 0.0
    tokens: int = 0
    done: bool = False


@dataclass
class Load:
    """What came of one load."""

    requests: list[Progress]
    seconds: float = 0.0
    most_running: int = 0
    preemptions: int = 0
    errors: list[str] = field(default_factory=list)


@contextmanager
def serving(shape: Path, options: list[str], log: Path, seconds: float) -> Iterator[str]:
    """A server with random weights; its address.

    Raises:
        RuntimeError: with the end of its log, if it does not start within ``seconds``.
    """
    with tempfile.TemporaryDirectory() as folder, log.open("w") as lines:
        config = json.loads(shape.read_text()) | {"architectures": ["LlamaForCausalLM"]}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
            *("--skip-tokenizer-init", "--load-format", "dummy", "--dtype", "bfloat16"),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
            *("--stream-interval", str(STREAM_INTERVAL), "--no-enable-prefix-caching", *options),
        ]
        server = subprocess.Popen(command, stdout=lines, stderr=lines, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + seconds
            while not _answers_health(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no server: {_last_error(log)}")
                time.sleep(0.5)
            yield url
        finally:
            _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and its engine, which would otherwise keep the GPU's memory."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
            server.wait(15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _answers_health(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _last_error(log: Path) -> str:
    """The last line of ``log`` that names a cause, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
    causes = [line for line in errors if "See root cause above" not in line]
    return (causes or errors or lines or ["no output"])[-1][-500:]


def metrics(url: str) -> tuple[dict[str, float], dict[str, str]]:
    """The server's counters, summed over labels, and what it says of its KV cache."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    cache: dict[str, str] = {}
    for name, labels, value in re.findall(r"^vllm:(\w+)(\{.*\})? (\S+)$", text, re.MULTILINE):
        values[name] = values.get(name, 0.0) + float(value)
        if name == "cache_config_info":
            cache = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    return values, cache


async def load(url: str, rate: float, count: int, prompt: int, answer: int, seconds: float) -> Load:
    """Sends ``count`` requests at ``rate`` a second on average, for at most ``seconds``."""
    import aiohttp  # pyright: ignore[reportMissingImports]

    chance = random.Random(0)
    vocabulary = 1000  # of the prompts; every model has that many
    outcome = Load([Progress() for _ in range(count)])

    async def ask(
        session: aiohttp.ClientSession, progress: Progress, delay: float, tokens: list[int]
    ) -> None:
        await asyncio.sleep(delay)
        begin = time.perf_counter()
        body = {
            "model": "model",
            "prompt": tokens,
            "max_tokens": answer,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                message = json.loads(line[len(b"data: ") :])
                if "error" in message:
                    raise RuntimeError(str(message["error"])[:300])
                found = len(message["choices"][0].get("token_ids") or [])
                if found and not progress.tokens:
                    progress.first_token = time.perf_counter() - begin
                progress.tokens += found
        progress.total = time.perf_counter() - begin
        progress.done = True

    async def watch() -> None:
        while True:
            values, _ = await asyncio.to_thread(metrics, url)
            running = int(values.get("num_requests_running", 0))
            outcome.most_running = max(outcome.most_running, running)
            await asyncio.sleep(0.25)

    before = metrics(url)[0].get("num_preemptions_total", 0.0)
    arrivals = [chance.expovariate(rate) for _ in range(count)]
    delays = [sum(arrivals[: i + 1]) for i in range(count)]
    prompts = [[chance.randrange(vocabulary) for _ in range(prompt)] for _ in range(count)]
    options = {
        "connector": aiohttp.TCPConnector(limit=0),
        "timeout": aiohttp.ClientTimeout(total=None),
        "read_bufsize": 65536 + 16 * prompt,  # the first message repeats the prompt in one line
    }
    async with aiohttp.ClientSession(**options) as session:
        begin = time.perf_counter()
        watching = asyncio.create_task(watch())
        asked = [
            asyncio.create_task(ask(session, progress, delay, tokens))
            for progress, delay, tokens in zip(outcome.requests, delays, prompts)
        ]
        done, late = await asyncio.wait(asked, timeout=seconds)
        outcome.seconds = time.perf_counter() - begin
        for task in (watching, *late):
            task.cancel()
        await asyncio.gather(watching, *late, return_exceptions=True)
        outcome.errors = [repr(e) for task in done if (e := task.exception()) is not None]
    outcome.preemptions = int(metrics(url)[0].get("num_preemptions_total", 0.0) - before)
    return outcome


def summary(outcome: Load, prompt: int) -> dict[str, Any]:
    """Tokens a second, and milliseconds: to the first token and between tokens.

    Throughput counts every token that came, latencies the requests that got all of theirs.
    """
    finished = [r for r in outcome.requests if r.done]
    started = [r for r in outcome.requests if r.tokens]
    row: dict[str, Any] = {
        "finished": len(finished),
        "most_running": outcome.most_running,
        "preemptions": outcome.preemptions,
        "seconds": outcome.seconds,
        "answer_tokens_per_second": sum(r.tokens for r in started) / outcome.seconds,
        "prompt_tokens_per_second": prompt * len(started) / outcome.seconds,
    }
    if finished:
        first = [1e3 * r.first_token for r in finished]
        between = [1e3 * (r.total - r.first_token) / max(1, r.tokens - 1) for r in finished]
        row |= {
            "first_token_ms": statistics.median(first),
            "first_token_ms_p90": _ninth_decile(first),
            "between_tokens_ms": statistics.median(between),
            "between_tokens_ms_p90": _ninth_decile(between),
        }
    if outcome.errors:
        row["error"] = f"{len(outcome.errors)} requests failed, the first with {outcome.errors[0]}"
    return row


def _ninth_decile(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1] if len(values) > 1 else values[0]


def measure(
    name: str,
    shape: Path,
    options: list[str],
    rates: list[float],
    count: int,
    prompt: int,
    answer: int,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """A row for each rate, or one that says why there is none; all within ``seconds``."""
    deadline = time.monotonic() + seconds
    row: dict[str, Any] = {"cache": name}
    try:
        log = Path(tempfile.gettempdir()) / f"serving_{name}.log"
        with serving(shape, options, log, seconds) as url:
            row["start_seconds"] = seconds - (deadline - time.monotonic())
            cache = metrics(url)[1]
            fits = {"cache_tokens": "kv_cache_size_tokens", "fit": "kv_cache_max_concurrency"}
            row |= {key: float(cache[label]) for key, label in fits.items() if label in cache}
            left = deadline - time.monotonic()
            warm = asyncio.run(load(url, float("inf"), WARM_UP, prompt, answer, left))
            if warm.errors:
                raise RuntimeError(f"no answer to the first requests: {warm.errors[0]}")
            for tried, rate in enumerate(rates):
                left = (deadline - time.monotonic()) / (len(rates) - tried)
                if left <= 0:
                    raise RuntimeError(f"no time left after {seconds:.0f} s")
                outcome = asyncio.run(load(url, rate, count, prompt, answer, left))
                yield row | {"rate": str(rate), **summary(outcome, prompt)}
    except (RuntimeError, OSError, ValueError) as error:
        yield row | {"error": str(error)}


def main(
    memory: Annotated[float, typer.Option(min=0.01, help="GiB for the KV cache.")] = 40.0,
    rates: Annotated[
        str, typer.Option(help="Requests per second, separated by commas; inf for all at once.")
    ] = "1,4,16",
    caches: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(CACHES),
    requests: Annotated[int, typer.Option(min=2, help="Per rate.")] = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 8192,
    answer: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 256,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 512,
    seconds: Annotated[
        float, typer.Option(min=1, help="Per cache, the server's start included.")
    ] = 3600.0,
    backend: Annotated[
        str, typer.Option(help="Attention backend of bf16 and fp8; vLLM's choice if empty.")
    ] = "",
    server: Annotated[str, typer.Option(help="More options of every server, as in a shell.")] = "",
    shape: Annotated[Path, typer.Option(exists=True, help="config.json of a Llama.")] = SHAPE,
) -> None:
    """Measures, prints and records."""
    names = caches.split(",")
    if unknown := sorted(set(names) - set(CACHES)):
        raise typer.BadParameter(f"{unknown}: expected some of {list(CACHES)}")
    try:
        speeds = [float(rate) for rate in rates.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--rates: {error}") from error
    shared = [
        *("--kv-cache-memory-bytes", str(int(memory * (1 << 30)))),
        *("--max-model-len", str(prompt + answer), "--max-num-seqs", str(max_num_seqs)),
        *shlex.split(server),
    ]
    settings = {
        "shape": shape.name,
        "memory_gib": memory,
        "requests": requests,
        "prompt": prompt,
        "answer": answer,
        "max_num_seqs": max_num_seqs,
        "seconds": seconds,
        "backend": backend or "default",
        "server": server,
    }
    rows: list[dict[str, Any]] = []
    for name in names:
        chosen = ["--attention-backend", backend] if backend and name in PLAIN else []
        options = [*shared, *CACHES[name], *chosen]
        for row in measure(name, shape, options, speeds, requests, prompt, answer, seconds):
            rows.append(row)
            print(json.dumps(row), flush=True)
            record.write("serving", settings, rows)
    table = Table(*COLUMNS.values())
    for row in rows:
        table.add_row(*(_cell(row.get(key, "")) for key in COLUMNS))
    Console().print(table)
    for row in rows:
        if "error" in row:
            print(f"{row['cache']}: {row['error']}")


def _cell(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
