"""Text of a Python installation: its libraries' code and documentation, some never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT = (
    "click",
    "jinja2",
    "networkx",
    "pygments",
    "requests",
    "rich",
    "shellingham",
    "werkzeug",
)
"""Packages never trained on, those of them that are there."""

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
SKIPPED_DIRECTORIES = {"__pycache__", "_vendor", "vendor", "encodings", "pydoc_data", "pip"}
"""Copies of other packages, and directories of generated tables."""
LONGEST_FILE, LONGEST_LINE = 300_000, 1_000
"""Characters; more are data, not text."""


@dataclass
class Texts:
    """Texts of an installation by relative path, and what they were."""

    training: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> dict:
        """Counts and a hash of all texts."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for path, text in part.items():
                digest.update(f"{path}\0{text}\0".encode())
        return {
            "files": len(self.training),
            "megabytes": round(sum(map(len, self.training.values())) / 1e6, 2),
            "held_out_packages": sorted({path.split("/")[0] for path in self.held_out}),
            "held_out_megabytes": round(sum(map(len, self.held_out.values())) / 1e6, 2),
            "sha256": digest.hexdigest()[:16],
        }


def read_installation(roots: list[Path]) -> Texts:
    """Every text below ``roots`` once, however many copies of it there are.

    Raises:
        ValueError: if none of :data:`HELD_OUT` is there.
    """
    found, seen = Texts(), set()
    for root in roots:
        for path, text in _texts(root):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                name = path.as_posix()
                (found.held_out if path.parts[0] in HELD_OUT else found.training)[name] = text
    if not found.held_out:
        raise ValueError(f"{roots}: none of the packages {HELD_OUT}")
    return found


def _texts(root: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in SUFFIXES or SKIPPED_DIRECTORIES & set(relative.parts):
            continue
        if relative.parts[0] == "site-packages":  # a root of its own
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        longest_line = max(map(len, text.split("\n")))
        if text.strip() and len(text) <= LONGEST_FILE and longest_line <= LONGEST_LINE:
            yield relative, text
