"""Windows to train and to evaluate small models on: text, plus random lines to be recalled.

Into random slices of a token stream pairs of lines are planted, ``REF_x7k2 = 48213`` and, 20 tokens
to nearly a window later, ``assert REF_x7k2 == 48213``, so that a model has to learn to look values
up far back in its context.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import IterableDataset, get_worker_info

BOS, BOS_ID = "<bos>", 0
ANSWER_DIGITS = 5
ANSWER_WEIGHT = 4.0
"""Loss weight of a recalled digit; text counts 1, unpredictable planted tokens 0."""


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


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str], begin: bool = True) -> np.ndarray:
    """Concatenate the texts' tokens, each with <bos> before it if ``begin``."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=begin)
    return np.concatenate([np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings])


@dataclass
class Window:
    """Tokens with a loss weight each, and where the recalled digits are."""

    tokens: np.ndarray
    weights: np.ndarray
    answers: list[range] = field(default_factory=list)
    distances: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What is planted: where it is defined and where (if at all) it is asserted.

    Positions are fractions of the finished window. The value is one number or several, a token
    for each of its characters.
    """

    name: str
    value: str
    defined_at: float
    asserted_at: float | None


def random_reference(
    rng: np.random.Generator, defined_at: float, asserted_at: float | None, numbers: int = 1
) -> Reference:
    """Draw a fresh name and as many ``numbers``."""
    name = "".join(rng.choice(list(string.ascii_lowercase + string.digits), size=4))
    value = " ".join(
        "".join(rng.choice(list(string.digits), size=ANSWER_DIGITS)) for _ in range(numbers)
    )
    return Reference(f"REF_{name}", value, defined_at, asserted_at)


def training_references(
    rng: np.random.Generator, window: int, most_numbers: int
) -> list[Reference]:
    """Draw the references of one training window: asserted ones and distractors."""
    far = 1000 / 2048, 1900 / 2048
    references = []

    def numbers() -> int:
        return int(rng.integers(1, most_numbers + 1)) if most_numbers > 1 else 1

    for _ in range(rng.integers(4, 15)):
        if rng.random() < 0.5:
            fraction = rng.uniform(*far)
        else:
            fraction = np.exp(rng.uniform(np.log(20 / window), np.log(far[0])))
        defined_at = rng.uniform(0, 0.98 - fraction)
        references.append(random_reference(rng, defined_at, defined_at + fraction, numbers()))
    for _ in range(rng.integers(0, 7)):
        references.append(random_reference(rng, rng.uniform(0, 0.98), None, numbers()))
    return references


def held_out_references(rng: np.random.Generator, count: int) -> list[Reference]:
    """Draw references defined near the start and asserted, shuffled, far behind."""
    defined = np.linspace(0.01, 0.18, count)
    asserted = rng.permutation(np.linspace(0.75, 0.95, count))
    return [random_reference(rng, *positions) for positions in zip(defined, asserted, strict=True)]


class WindowMaker:
    """Cuts windows of ``length`` tokens out of a stream, and plants reference lines in them."""

    def __init__(self, tokenizer: Tokenizer, stream: np.ndarray, length: int) -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.length = length
        texts = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
        self._starts_line = np.array([text.startswith("\n") for text in texts])
        self._spaces_after_newline = np.array([len(t) - len(t.rstrip(" ")) for t in texts])
        self._starts_with_space = np.array([text.startswith(" ") for text in texts])

    def plain(self, start: int) -> Window:
        """Return <bos> and the stream's tokens from ``start`` on, nothing planted."""
        tokens = np.concatenate([[BOS_ID], self.stream[start : start + self.length - 1]])
        return Window(tokens, np.ones(self.length, dtype=np.float32))

    def random_start(self, rng: np.random.Generator) -> int:
        """Return a random place at which a whole window fits in the stream."""
        return int(rng.integers(0, len(self.stream) - self.length))

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
        code_length = self.length - sum(10 + len(r.value) for *_, r in lines)
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
            text = f"\n{' ' * indent}{keyword}{reference.name}{equals}{reference.value}"
            planted = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids)
            planted_weights = np.zeros(len(planted), dtype=np.float32)
            answer = len(reference.value)
            first_digit = length + (at - taken) + len(planted) - answer
            if not keyword:
                defined[reference.name] = first_digit
            elif first_digit + answer <= self.length:
                planted_weights[-answer:] = ANSWER_WEIGHT
                planted_weights[-answer - 1] = 1.0  # the space before the first digit
                answers.append(range(first_digit, first_digit + answer))
                distances.append(first_digit - defined[reference.name])
            pieces += [code[taken:at], planted]
            weights += [np.ones(at - taken, dtype=np.float32), planted_weights]
            length += at - taken + len(planted)
            taken = at
        pieces.append(code[taken:])
        weights.append(np.ones(len(code) - taken, dtype=np.float32))
        return Window(
            np.concatenate(pieces)[: self.length],
            np.concatenate(weights)[: self.length],
            answers,
            distances,
        )


class TrainingWindows(IterableDataset):
    """An endless supply of random (tokens, weights); three windows in four have references."""

    recall_share = 0.75

    def __init__(self, maker: WindowMaker, seed: int, most_numbers: int = 1) -> None:
        self.maker = maker
        self.seed = seed
        self.most_numbers = most_numbers

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            start = self.maker.random_start(rng)
            if rng.random() < self.recall_share:
                references = training_references(rng, self.maker.length, self.most_numbers)
                window = self.maker.with_references(start, references)
            else:
                window = self.maker.plain(start)
            yield torch.from_numpy(window.tokens.astype(np.int64)), torch.from_numpy(window.weights)


def build_held_out(
    maker: WindowMaker, seed: int, plain: int = 24, recall: int = 48
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return the arrays of ``heldout.npz`` and every definition-to-assertion distance."""
    rng = np.random.default_rng(seed)
    references_each = 8
    plain_starts = np.linspace(0, len(maker.stream) - maker.length, plain).astype(int)
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
