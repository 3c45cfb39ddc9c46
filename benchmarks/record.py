"""Machine-written result files: what was measured, where, with which versions and commit."""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@functools.cache
def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    packages = ("torch", "transformers", "triton", "optimum-quanto", "hqq", "flash-attn", "vllm")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **_gpu(),
    }


def write(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes ``results/<name>.json``, replacing an earlier run."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_csv(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes ``results/<name>.csv``: the same rows, each with hardware, versions and commit.

    What is nested gets a column of its own, named ``outer.inner``.
    """
    found = environment()
    fixed = {key: found.get(key) for key in ("gpu", "gpu_driver", "commit", "date")}
    fixed |= {key: found["versions"][key] for key in ("torch", "triton", "transformers")}
    flat = [{**_flatten(row), **fixed} for row in rows]
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
    return path


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": part for inner, part in _flatten(value).items()}
        else:
            flat[key] = value
    return flat


def _gpu() -> dict[str, Any]:
    """Driver, memory and size of the GPU, nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        driver = lines.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "gpu_driver": driver,
        "gpu_memory_gib": round(properties.total_memory / (1 << 30), 1),
        "gpu_multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _commit() -> str:
    """From ``GIT_COMMIT``, for a machine that has the tree but not its history, or from git."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()
