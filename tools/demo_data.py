"""Data for the demo model: the Python standard library, plus random lines to be recalled.

Three things are made here:

* the training stream: every standard-library source file, except a fixed list of held-out
  modules (and their tests), tokenized with a small byte-level BPE vocabulary;
* training windows: random slices of that stream into which pairs of lines are planted,
  ``REF_x7k2 = 48213`` and, 20 to 1900 tokens later, ``assert REF_x7k2 == 48213``, so that the
  model has to learn to look values up far back in its context;
* the held-out files shipped with the model: plain windows, recall windows, and a prompt.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import IterableDataset, get_worker_info

WINDOW = 2048
"""Tokens in every window, for training and for evaluation."""

BOS, BOS_ID = "<bos>", 0
ANSWER_DIGITS = 5
ANSWER_WEIGHT = 4.0
"""Loss weight of a recalled digit; code counts 1, unpredictable planted tokens 0."""

HELD_OUT_MODULES = (
    "calendar", "cmd", "configparser", "csv", "difflib", "fractions", "gettext", "graphlib",
    "heapq", "plistlib", "sched", "shlex", "statistics", "textwrap",
)  # fmt: skip
"""Modules never trained on. Files named like them, or like their tests, are dropped too."""

SKIPPED_DIRECTORIES = {"site-packages", "__pycache__", "encodings", "pydoc_data"}
"""Third-party code, and directories of generated tables."""


# ------------------------------------------------------------------------------ source text


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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Concatenate the texts' tokens; the tokenizer puts <bos> before each text."""
    encodings = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings])


# ---------------------------------------------------------------------------- recall windows


@dataclass
class Window:
    """WINDOW tokens with a loss weight each, and where the recalled digits are."""

    tokens: np.ndarray
    weights: np.ndarray
    answers: list[range] = field(default_factory=list)
    distances: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A planted value: where it is defined and where (if at all) it is asserted.

    Positions are fractions of the finished window.
    """

    name: str
    digits: str
    defined_at: float
    asserted_at: float | None


def random_reference(
    rng: np.random.Generator, defined_at: float, asserted_at: float | None
) -> Reference:
    """Draw a fresh name and value."""
    name = "".join(rng.choice(list(string.ascii_lowercase + string.digits), size=4))
    digits = "".join(rng.choice(list(string.digits), size=ANSWER_DIGITS))
    return Reference(f"REF_{name}", digits, defined_at, asserted_at)


def training_references(rng: np.random.Generator) -> list[Reference]:
    """Draw the references of one training window: asserted ones and distractors."""
    references = []
    for _ in range(rng.integers(4, 15)):
        if rng.random() < 0.5:
            distance = rng.uniform(1000, 1900)
        else:
            distance = np.exp(rng.uniform(np.log(20), np.log(1000)))
        fraction = distance / WINDOW
        defined_at = rng.uniform(0, 0.98 - fraction)
        references.append(random_reference(rng, defined_at, defined_at + fraction))
    for _ in range(rng.integers(0, 7)):
        references.append(random_reference(rng, rng.uniform(0, 0.98), None))
    return references


def held_out_references(rng: np.random.Generator, count: int) -> list[Reference]:
    """Draw references defined near the start and asserted, shuffled, about 1.5K tokens later."""
    defined = np.linspace(0.01, 0.18, count)
    asserted = rng.permutation(np.linspace(0.75, 0.95, count))
    return [random_reference(rng, *positions) for positions in zip(defined, asserted, strict=True)]


class WindowMaker:
    """Cuts windows out of a token stream and plants reference lines between code lines."""

    def __init__(self, tokenizer: Tokenizer, stream: np.ndarray) -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        texts = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
        self._starts_line = np.array([text.startswith("\n") for text in texts])
        self._spaces_after_newline = np.array([len(t) - len(t.rstrip(" ")) for t in texts])
        self._starts_with_space = np.array([text.startswith(" ") for text in texts])

    def plain(self, start: int) -> Window:
        """Return <bos> and the stream's tokens from ``start`` on, nothing planted."""
        tokens = np.concatenate([[BOS_ID], self.stream[start : start + WINDOW - 1]])
        return Window(tokens, np.ones(WINDOW, dtype=np.float32))

    def random_start(self, rng: np.random.Generator) -> int:
        """Return a random place at which a whole window fits in the stream."""
        return int(rng.integers(0, len(self.stream) - WINDOW))

    def with_references(self, start: int, references: list[Reference]) -> Window:
        """Return a window of code from ``start`` with the references' lines planted in it.

        Lines are planted only in front of a token that starts a new line, where they leave the
        tokens around them as they are. An assertion that no longer fits is cut off.
        """
        code = self.plain(start).tokens
        lines = [(r.defined_at, "", " = ", r) for r in references]
        lines += [
            (r.asserted_at, "assert ", " == ", r) for r in references if r.asserted_at is not None
        ]
        # Planted lines take up some of the window; the code gets what they leave.
        code_length = WINDOW - 15 * len(lines)
        line_starts = np.flatnonzero(self._starts_line[code[:-1]])
        if not len(line_starts):
            return self.plain(start)
        pieces: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        answers: list[range] = []
        distances: list[int] = []
        defined: dict[str, int] = {}
        length = taken = 0
        for where, keyword, equals, reference in sorted(lines, key=lambda line: line[0]):
            target = np.searchsorted(line_starts, where * code_length)
            at = max(int(line_starts[min(target, len(line_starts) - 1)]), taken)
            indent = self._spaces_after_newline[code[at]] + self._starts_with_space[code[at + 1]]
            text = f"\n{' ' * indent}{keyword}{reference.name}{equals}{reference.digits}"
            planted = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids)
            planted_weights = np.zeros(len(planted), dtype=np.float32)
            first_digit = length + (at - taken) + len(planted) - ANSWER_DIGITS
            if not keyword:
                defined[reference.name] = first_digit
            elif first_digit + ANSWER_DIGITS <= WINDOW:
                planted_weights[-ANSWER_DIGITS:] = ANSWER_WEIGHT
                planted_weights[-ANSWER_DIGITS - 1] = 1.0  # the space before the first digit
                answers.append(range(first_digit, first_digit + ANSWER_DIGITS))
                distances.append(first_digit - defined[reference.name])
            pieces += [code[taken:at], planted]
            weights += [np.ones(at - taken, dtype=np.float32), planted_weights]
            length += at - taken + len(planted)
            taken = at
        pieces.append(code[taken:])
        weights.append(np.ones(len(code) - taken, dtype=np.float32))
        return Window(
            np.concatenate(pieces)[:WINDOW], np.concatenate(weights)[:WINDOW], answers, distances
        )


class TrainingWindows(IterableDataset):
    """An endless supply of random (tokens, weights); three windows in four have references."""

    def __init__(self, maker: WindowMaker, seed: int, recall_share: float = 0.75) -> None:
        self.maker = maker
        self.seed = seed
        self.recall_share = recall_share

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            start = self.maker.random_start(rng)
            if rng.random() < self.recall_share:
                window = self.maker.with_references(start, training_references(rng))
            else:
                window = self.maker.plain(start)
            yield torch.from_numpy(window.tokens.astype(np.int64)), torch.from_numpy(window.weights)


# --------------------------------------------------------------------------- held-out files


def build_held_out(
    tokenizer: Tokenizer, texts: Iterable[str], seed: int, plain: int = 24, recall: int = 48
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return the arrays of ``heldout.npz`` and every definition-to-assertion distance."""
    rng = np.random.default_rng(seed)
    references_each = 8
    maker = WindowMaker(tokenizer, encode_stream(tokenizer, texts))
    plain_starts = np.linspace(0, len(maker.stream) - WINDOW, plain).astype(int)
    recall_windows: list[Window] = []
    while len(recall_windows) < recall:
        references = held_out_references(rng, references_each)
        window = maker.with_references(maker.random_start(rng), references)
        if len(window.answers) == references_each:
            recall_windows.append(window)
    arrays = {
        "text": np.stack([maker.plain(start).tokens for start in plain_starts]).astype(np.uint16),
        "recall": np.stack([window.tokens for window in recall_windows]).astype(np.uint16),
        "answer_pos": np.array(
            [[list(answer) for answer in window.answers] for window in recall_windows],
            dtype=np.int32,
        ),
    }
    return arrays, [distance for window in recall_windows for distance in window.distances]


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
