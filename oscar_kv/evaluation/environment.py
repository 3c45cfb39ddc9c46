"""Where and with what a result was made: hardware, versions and commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@functools.cache
def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    packages = ("transformers", "triton", "optimum-quanto", "hqq", "flash-attn", "vllm")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {
            "torch": str(torch.__version__),  # with its build, which the metadata may not have
            **{name: _version(name) for name in packages},
        },
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **_gpu(),
    }


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
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
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
