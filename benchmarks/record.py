"""Machine-written result files: what was measured, where, with which versions and commit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from oscar_kv.evaluation.environment import environment
from oscar_kv.replacing import replacing

RESULTS = Path(__file__).parent / "results"


def write(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes ``results/<name>.json``, replacing an earlier run."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "settings": settings, "rows": rows}
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
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
