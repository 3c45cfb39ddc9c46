"""Recall: values defined somewhere in a long text, asked for at its end."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oscar_kv.evaluation.cache import FULL_BITS, Contender, bits_of
from oscar_kv.evaluation.names import require_at_least
from oscar_kv.evaluation.reference import Reference
from oscar_kv.evaluation.subject import Subject
from oscar_kv.evaluation.tasks.base import Measured, Progress
from oscar_kv.evaluation.teacher import fill, forced


@dataclass(frozen=True)
class Needles:
    """A text with needles in it.

    Attributes:
        tokens: int ``[1, T]``: the context, then questions with their answers.
        context: tokens before the first question.
        answers: for every question, where the tokens of its answer are in ``tokens``.
        depths: for every question, the index of the needle's depth.
    """

    tokens: Tensor
    context: int
    answers: list[list[int]]
    depths: list[int]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Needles at evenly spread depths of texts of several lengths.

    An answer counts if every one of its tokens is the model's first choice given those before it.
    With ``keys=1`` every text has one needle, as in needle-in-a-haystack, and as many texts are
    made as there are depths; with more, a text has ``keys`` needles at as many depths and is asked
    for all of them in random order (multi-key recall). ``values`` numbers behind one name are
    multi-value recall: all of them have to be right.

    Attributes:
        lengths: tokens of the context, multiples of 128 to make steps what decoding would be.
        keys: needles in a text.
        values: numbers of five digits behind every name.
        depths: rows of the heat map.
        trials: texts per length (and depth, if ``keys`` is 1).
        definition: the needle, put where a line ends; ``{key}`` and ``{value}`` are filled in.
        question: likewise; the answer is its ``{value}``.
        step: tokens per forward pass.
    """

    lengths: tuple[int, ...] = (512, 1024, 1536)
    keys: int = 8
    values: int = 1
    depths: int = 8
    trials: int = 4
    definition: str = "\nREF_{key} = {value}"
    question: str = "\nassert REF_{key} == {value}"
    step: int = 32
    name: ClassVar[str] = "recall"

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("lengths=(): expected at least one")
        require_at_least(1, lengths=min(self.lengths), keys=self.keys, values=self.values)
        require_at_least(1, depths=self.depths, trials=self.trials, step=self.step)
        if self.keys > 1 and self.keys % self.depths:
            raise ValueError(f"keys={self.keys}: expected 1 or a multiple of depths={self.depths}")
        for name in ("definition", "question"):
            template = getattr(self, name)
            fields = {field for _, field, _, _ in string.Formatter().parse(template)} - {None}
            if fields != {"key", "value"}:
                raise ValueError(f"{name}={template!r}: expected {{key}} and {{value}} in it")

    @property
    def count(self) -> int:
        return len(self.lengths) * self.trials * (self.depths if self.keys == 1 else 1)

    def require(self, subject: Subject) -> None:
        longest = max(text.tokens.shape[1] for _, text in self.texts(subject, seed=0))
        subject.require_context(longest)

    def run(
        self, subject: Subject, contenders: Iterable[Contender], seed: int, progress: Progress
    ) -> Iterator[Measured]:
        """``recall``, the share of right answers, and ``map``, the same by length and depth."""
        reference, texts = Reference(subject.model), self.texts(subject, seed)
        asked = torch.zeros(len(self.lengths), self.depths)
        for row, text in texts:
            for depth in text.depths:
                asked[row, depth] += 1
        for one in contenders:
            right, bits = torch.zeros_like(asked), FULL_BITS
            for row, text in texts:
                cache = fill(one.make_cache(), reference.prompt(text.tokens[:, : text.context]))
                steps = forced(subject.model, text.tokens, cache, text.context, self.step)
                hits = torch.cat([logits.argmax(-1) == wanted for logits, wanted in steps], 1)[0]
                for depth, answer in zip(text.depths, text.answers):
                    # the logits at position p choose token p + 1
                    where = torch.tensor(answer, device=hits.device) - 1 - text.context
                    right[row, depth] += bool(hits[where].all())
                bits = bits_of(cache)
                progress(1)
            result = {
                "recall": float(right.sum() / asked.sum()),
                "answers": int(asked.sum()),
                "map": (right / asked).tolist(),
            }
            yield Measured(bits, result)

    def texts(self, subject: Subject, seed: int) -> list[tuple[int, Needles]]:
        """All texts with the index of their length: the same for the same seed."""
        draw = random.Random(seed)
        fillers = subject.windows(len(subject.rows), max(self.lengths))
        texts = []
        for row, length in enumerate(self.lengths):
            for _ in range(self.trials):
                every_depth = list(range(self.depths))
                groups = [[depth] for depth in every_depth]
                if self.keys > 1:
                    groups = [every_depth * (self.keys // self.depths)]
                for depths in groups:
                    filler = fillers[draw.randrange(len(fillers)), :length].tolist()
                    texts.append((row, self._text(subject.tokenizer, filler, depths, draw)))
        return texts

    def _text(
        self, tokenizer: Any, filler: list[int], depths: list[int], draw: random.Random
    ) -> Needles:
        names: set[str] = set()
        while len(names) < len(depths):
            names.add("".join(draw.choices(string.ascii_lowercase, k=4)))
        needles = []
        for name, depth in zip(sorted(names), depths):
            value = " ".join(str(draw.randrange(10_000, 100_000)) for _ in range(self.values))
            needles.append((name, value, depth))
        length = len(filler)
        planted = [self._encode(tokenizer, self.definition, *n[:2])[0] for n in needles]
        if (needed := sum(map(len, planted))) >= length:
            raise ValueError(
                f"{length} of lengths: the needles alone are {needed} tokens; expected more, or "
                "fewer keys or values"
            )
        filler = filler[: length - needed]
        # Only where a line ends, and from the back, so that earlier places stay where they are.
        ends = {t for t in set(filler) if tokenizer.decode([t]).startswith("\n")}
        lines = [i for i, token in enumerate(filler) if token in ends] or [len(filler)]
        context = list(filler)
        for (_, _, depth), ids in sorted(
            zip(needles, planted), key=lambda pair: pair[0][2], reverse=True
        ):
            wanted = len(filler) * (depth + 0.5) / self.depths
            place = min(lines, key=lambda line: abs(line - wanted))
            context[place:place] = ids
        tokens, answers, asked = context[:], [], []
        draw.shuffle(needles)
        for name, value, depth in needles:
            ids, positions = self._encode(tokenizer, self.question, name, value)
            answers.append([len(tokens) + position for position in positions])
            asked.append(depth)
            tokens += ids
        return Needles(torch.tensor([tokens]), length, answers, asked)

    def _encode(
        self, tokenizer: Any, template: str, key: str, value: str
    ) -> tuple[list[int], list[int]]:
        """Token ids of a filled-in template, and which of them are the value's."""
        text = template.format(key=key, value=value)
        begin = template.format(key=key, value="\0").index("\0")
        end = begin + len(value)
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = coded["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(spans) if a < end and b > begin and b > a]
        return coded["input_ids"], inside
