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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import oscar_kv
from benchmarks import record

CACHES: dict[str, list[str]] = {
    "bf16": [],
    "fp8": ["--kv-cache-dtype", "fp8"],
    "turboquant_4bit": ["--kv-cache-dtype", "turboquant_4bit_nc"],
    "turboquant_3bit": ["--kv-cache-dtype", "turboquant_3bit_nc"],
    "oscar_kv": ["--attention-backend", "OSCAR_KV"],
}
"""What a server is started with."""

SHAPE = Path(__file__).parent / "configs" / "llama_8b.json"
TOKENIZER = Path(oscar_kv.__file__).parent / "models" / "demo"
TOKENS = 4096
"""Ids below this are words of that tokenizer: the only ones asked and answered."""
START_SECONDS = 900.0


@dataclass(frozen=True)
class Timing:
    """One request, in seconds."""

    first_token: float
    total: float
    tokens: int


@contextmanager
def serving(options: list[str], log: Path) -> Iterator[str]:
    """A server with random weights; its address.

    Raises:
        RuntimeError: with the end of its log, if it does not start.
    """
    with tempfile.TemporaryDirectory() as folder, log.open("w") as lines:
        config = json.loads(SHAPE.read_text()) | {"architectures": ["LlamaForCausalLM"]}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
            *("--tokenizer", str(TOKENIZER), "--load-format", "dummy", "--dtype", "bfloat16"),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
            *("--no-enable-prefix-caching", *options),
        ]
        server = subprocess.Popen(command, stdout=lines, stderr=lines, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _healthy(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no server: {log.read_text()[-2000:]}")
                time.sleep(1.0)
            yield url
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


async def load(
    url: str, rate: float, requests: int, prompt: int, answer: int
) -> tuple[float, list[Timing]]:
    """Sends ``requests`` at ``rate`` a second on average; seconds in all and each request's."""
    from openai import AsyncOpenAI  # pyright: ignore[reportMissingImports]

    chance = random.Random(0)

    async def ask(client: AsyncOpenAI, delay: float, tokens: list[int]) -> Timing:
        await asyncio.sleep(delay)
        begin = time.perf_counter()
        stream = await client.completions.create(
            model="model",
            prompt=tokens,
            max_tokens=answer,
            stream=True,
            extra_body={
                "ignore_eos": True,
                "allowed_token_ids": list(range(TOKENS)),
                "return_token_ids": True,
            },
        )
        first, received = 0.0, 0
        async for chunk in stream:
            found = len((chunk.choices[0].model_extra or {}).get("token_ids") or [])
            if found and not received:
                first = time.perf_counter() - begin
            received += found
        return Timing(first, time.perf_counter() - begin, received)

    arrivals = [chance.expovariate(rate) for _ in range(requests)]
    delays = [sum(arrivals[: i + 1]) for i in range(requests)]
    prompts = [[chance.randrange(TOKENS) for _ in range(prompt)] for _ in range(requests)]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600.0) as client:
        begin = time.perf_counter()
        asked = (ask(client, delay, tokens) for delay, tokens in zip(delays, prompts))
        timings = await asyncio.gather(*asked)
        return time.perf_counter() - begin, list(timings)


def summary(seconds: float, timings: list[Timing]) -> dict[str, float]:
    """Tokens a second, and milliseconds: to the first token and between tokens."""
    first = [1e3 * t.first_token for t in timings]
    between = [1e3 * (t.total - t.first_token) / max(1, t.tokens - 1) for t in timings]
    return {
        "tokens_per_second": sum(t.tokens for t in timings) / seconds,
        "first_token_ms": statistics.median(first),
        "first_token_ms_p90": statistics.quantiles(first, n=10)[-1],
        "between_tokens_ms": statistics.median(between),
        "between_tokens_ms_p90": statistics.quantiles(between, n=10)[-1],
    }


def main(
    memory: Annotated[float, typer.Option(min=0.1, help="GiB for the KV cache.")] = 40.0,
    rates: Annotated[
        str, typer.Option(help="Requests per second, separated by commas.")
    ] = "1,4,16",
    caches: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(CACHES),
    requests: Annotated[int, typer.Option(min=2, help="Per rate.")] = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 8192,
    answer: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 256,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 512,
) -> None:
    """Measures, prints and records."""
    names = caches.split(",")
    if unknown := sorted(set(names) - set(CACHES)):
        raise typer.BadParameter(f"{unknown}: expected some of {list(CACHES)}")
    shared = [
        *("--kv-cache-memory-bytes", str(int(memory * (1 << 30)))),
        *("--max-model-len", str(prompt + answer), "--max-num-seqs", str(max_num_seqs)),
    ]
    rows: list[dict[str, Any]] = []
    for name in names:
        log = Path(tempfile.gettempdir()) / f"serving_{name}.log"
        with serving([*shared, *CACHES[name]], log) as url:
            asyncio.run(load(url, 4.0, 4, prompt, answer))  # compiles what is compiled on first use
            for rate in map(float, rates.split(",")):
                seconds, timings = asyncio.run(load(url, rate, requests, prompt, answer))
                rows.append({"cache": name, "rate": rate, **summary(seconds, timings)})
    settings = {
        "shape": SHAPE.name,
        "memory_gib": memory,
        "requests": requests,
        "prompt": prompt,
        "answer": answer,
        "max_num_seqs": max_num_seqs,
    }
    table = Table()
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(f"{v:,.1f}" if isinstance(v, float) else v for v in row.values()))
    Console().print(table)
    print(record.write("serving", settings, rows))


if __name__ == "__main__":
    typer.run(main)
