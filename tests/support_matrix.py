"""Writes ``docs/models.md``: what our cache does for every class that generates text.

python tests/support_matrix.py    # minutes; each class by ``support.examine``
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from omni import SPEAKING
from support import Outcome, class_names, examine
from tiny_inputs import reads_media

PAGE = Path(__file__).parent.parent / "docs" / "models.md"

_INTRODUCTION = """# Models

What `OscarCache` (for models with an encoder, `OscarEncoderDecoderCache`) does for every class of
Transformers {version} that generates text. Written by `make support-matrix`: a tiny random model
of each class generates in float32 on a CPU, with its own cache, with ours where everything stays in
full precision, which must give the same tokens, and with `compact`, whose logits must be close.
Twice: with the model's own attention and with `attn_implementation="oscar"`, which must agree.
Prompts are two texts, one of them padded, except where an image or a sound is named. Layers are
those of the class's default config, one of each kind, or as in `tests/tiny_overrides.py`.
`make test-all` repeats it.

| outcome | classes |
|---|---|
{counts}
"""

_SECTIONS = {
    "packed": ("Attends from packed pages", ""),
    "dequantized": (
        "Works, attends over dequantized states",
        'Memory is saved, and each layer is dequantized as it is used, also with `"oscar"`.',
    ),
    "unsupported": ("Raises", "With these words."),
    "not tested": (
        "Not tested",
        "No tiny model could be built, or it did not generate with its own cache. That says "
        "nothing about ours.",
    ),
    "wrong": ("Wrong", "Bugs. This section should not exist."),
}

_DROP_CACHES = ("Phi3ForCausalLM", "Phi4MultimodalForCausalLM", "PhimoeForCausalLM")
_DROPPED = (
    " (while the text has `original_max_position_embeddings` tokens at most; then `generate` drops "
    "any cache, unless the prompt was read into it before: see the warning of `OscarCache`)"
)


def row(outcome: Outcome) -> str:
    """The line of ``docs/models.md`` for one class."""
    media = " (an image or a sound in the prompt)" if reads_media(outcome.name) else ""
    if outcome.name in SPEAKING:
        media = " (an image and a sound in the prompt; thinker and talker, each with its own cache)"
    limit = _DROPPED if outcome.name in _DROP_CACHES else ""
    reason = f": {outcome.reason}" if outcome.reason else ""
    return f"- `{outcome.name}`{media}{limit}{reason}"


def documented() -> dict[str, list[str]]:
    """The lines of each section of ``docs/models.md``, by outcome."""
    sections: dict[str, list[str]] = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        title, *lines = part.splitlines()
        status = next(status for status, (name, _) in _SECTIONS.items() if name == title)
        sections[status] = [line for line in lines if line.startswith("- ")]
    return sections


def documented_version() -> str:
    """The version of Transformers that ``docs/models.md`` is about."""
    return PAGE.read_text().split("Transformers ")[1].split()[0]


def render(outcomes: Iterable[Outcome]) -> str:
    """The whole page."""
    groups: dict[str, list[Outcome]] = {status: [] for status in _SECTIONS}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.name):
        groups[outcome.status].append(outcome)
    groups = {status: group for status, group in groups.items() if group}
    counts = "\n".join(f"| {_SECTIONS[status][0]} | {len(g)} |" for status, g in groups.items())
    parts = [_INTRODUCTION.format(version=transformers.__version__, counts=counts)]
    for status, group in groups.items():
        title, remark = _SECTIONS[status]
        paragraphs = [f"## {title}", remark, "\n".join(row(outcome) for outcome in group)]
        parts.append("\n\n".join(text for text in paragraphs if text) + "\n")
    return "\n".join(parts)


def _examine_quietly(name: str) -> Outcome:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    return examine(name)


def main() -> None:
    """Examines every class, several at a time, and writes the page."""
    names, outcomes = class_names(), []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=40) as pool:
        for outcome in pool.imap_unordered(_examine_quietly, names):
            outcomes.append(outcome)
            print(f"{len(outcomes)}/{len(names)} {outcome.status:12} {row(outcome)}", flush=True)
    PAGE.write_text(render(outcomes))
    if any(outcome.status == "wrong" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
