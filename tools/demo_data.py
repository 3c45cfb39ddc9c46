"""Text for the demo model: the Python standard library; and the prompt that ships with it."""

from __future__ import annotations

import re
from pathlib import Path

WINDOW = 2048
"""Tokens in every window, for training and for evaluation."""

HELD_OUT_MODULES = (
    "calendar", "cmd", "configparser", "csv", "difflib", "fractions", "gettext", "graphlib",
    "heapq", "plistlib", "sched", "shlex", "statistics", "textwrap",
)  # fmt: skip
"""Modules never trained on. Files named like them, or like their tests, are dropped too."""

SKIPPED_DIRECTORIES = {"site-packages", "__pycache__", "encodings", "pydoc_data"}
"""Third-party code, and directories of generated tables."""


def read_sources(stdlib: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return (training, held-out) source texts of a standard library, by relative path."""
    held_out_names = {f"{module}.py" for module in HELD_OUT_MODULES}
    dropped_names = held_out_names | {f"test_{module}.py" for module in HELD_OUT_MODULES}
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_DIRECTORIES & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if str(relative) in held_out_names:
            held_out[str(relative)] = text
        elif path.name not in dropped_names and text.strip():
            training[str(relative)] = text
    missing = held_out_names - held_out.keys()
    if missing:
        raise FileNotFoundError(f"{stdlib} lacks held-out modules: {sorted(missing)}")
    return training, held_out


PROMPT_MODULE = "shlex.py"
PROMPT_END = "            tok = self.pushback.popleft()\n"
PROMPT_REFERENCES = {
    # name: (value, the line it is planted in front of)
    "REF_k3vd": ("52907", "from io import StringIO"),
    "REF_w81m": ("18346", "class shlex:"),
    "REF_q0tz": ("73194", "        self.posix = posix"),
    "REF_h5nx": ("40862", "        self.commenters = "),
}
PROMPT_QUESTION = "REF_w81m"


def build_prompt(held_out: dict[str, str]) -> str:
    """Return real held-out code with a few references near its start and one asked at its end."""
    text = held_out[PROMPT_MODULE]
    end = text.index(PROMPT_END) + len(PROMPT_END)
    text = text[:end]
    for name, (value, before) in PROMPT_REFERENCES.items():
        place = re.search(f"^{re.escape(before)}", text, flags=re.MULTILINE)
        if place is None:
            raise ValueError(f"{PROMPT_MODULE} has no line that starts with {before!r}")
        indent = " " * (len(before) - len(before.lstrip()))
        text = f"{text[: place.start()]}{indent}{name} = {value}\n{text[place.start() :]}"
    indent = " " * (len(PROMPT_END) - len(PROMPT_END.lstrip()))
    return f"{text}{indent}assert {PROMPT_QUESTION} =="
