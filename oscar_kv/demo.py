"""The bundled model, continued and scored with three caches: what ``oscar-kv demo`` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from oscar_kv.config import FULL_PRECISION
from oscar_kv.evaluation.quality import make_cache, recall, score
from oscar_kv.generation import (
    Loaded,
    Token,
    cache_nbytes,
    continuation,
    full_precision_nbytes,
    load,
    tokens_per_second,
)
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.planner import LONG_CONTEXT, ModelShape

MODEL = Path(__file__).parent / "models" / "demo"
CACHES = (FULL_PRECISION, "paper", "compact")
NEW_TOKENS = 64
PREFIX = 1024
"""Prompt tokens of a scored window; the tokens after it are scored."""


@dataclass(frozen=True)
class CacheResult:
    """One cache's column of the table."""

    name: str
    text: str
    """The continuation."""
    nbytes: int
    """Allocated by the cache after the continuation, full-precision tail included."""
    ratio: float
    """How many times smaller than the same tokens in the model's dtype."""
    bits_per_element: float
    """Of everything allocated."""
    page_bits_per_element: float | None
    """Of quantized pages alone."""
    long_context_ratio: float
    """The ratio at ``long_context`` tokens, computed."""
    perplexity: float
    recall: float
    agreement: float
    """Share of scored tokens whose most likely token is the full-precision cache's."""
    same_tokens: int
    """Generated tokens equal to the full-precision cache's, position by position."""
    tokens_per_second: float | None


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured."""

    dtype: str
    prompt: str
    prompt_tokens: int
    new_tokens: int
    long_context: int
    scored_windows: int
    scored_tokens: int
    recall_windows: int
    recall_answers: int
    caches: list[CacheResult]


@dataclass
class Continuation:
    """What one cache made of the prompt."""

    cache: Cache
    text: str
    tokens: list[Token]


class Demo:
    """The bundled model, its prompt and its held-out windows.

    Args:
        folder: a model with ``prompt.txt`` and ``heldout.npz`` (``text``, ``recall``,
            ``answer_pos``) beside it.
        text_windows: held-out windows to score.
        recall_windows: windows with values to recall.

    Raises:
        ValueError: if the model cannot be loaded.
        OSError: if a file is missing.
    """

    def __init__(
        self, folder: Path = MODEL, *, text_windows: int = 12, recall_windows: int = 8
    ) -> None:
        # bfloat16 because that is what caches are compared with
        self.loaded: Loaded = load(folder, dtype="bfloat16", device="cpu")
        self.prompt = (folder / "prompt.txt").read_text(encoding="utf-8")
        self.prompt_ids = self.loaded.encode(self.prompt)
        with np.load(folder / "heldout.npz") as data:
            self.text = _tokens(data["text"][:text_windows])
            self.recall = _tokens(data["recall"][:recall_windows])
            self.answers = _tokens(data["answer_pos"][:recall_windows])

    @property
    def evaluation_steps(self) -> int:
        """How far :meth:`evaluate` counts."""
        return len(CACHES) * (len(self.text) + len(self.recall))

    def generate(
        self,
        new_tokens: int = NEW_TOKENS,
        show: Callable[[dict[str, Continuation]], None] | None = None,
    ) -> dict[str, Continuation]:
        """Continues the prompt with every cache, a token of each in turn.

        Args:
            new_tokens: of each continuation.
            show: called after every round with what there is so far.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        made = {name: Continuation(make_cache(model, name), "", []) for name in CACHES}
        streams = {
            name: continuation(model, self.prompt_ids, one.cache, new_tokens)
            for name, one in made.items()
        }
        for _ in range(new_tokens):
            for name, one in made.items():
                if (token := next(streams[name], None)) is not None:
                    one.tokens.append(token)
                    ids = [token.id for token in one.tokens]
                    one.text = tokenizer.decode(ids, skip_special_tokens=True)
            if show is not None:
                show(made)
        return made

    def evaluate(
        self, made: dict[str, Continuation], progress: Callable[[int], None] | None = None
    ) -> DemoResult:
        """Scores every cache on the held-out windows and sums up.

        Args:
            made: what :meth:`generate` returned.
            progress: called with the number of steps finished.
        """
        model = self.loaded.model
        scores = score(model, self.text, list(CACHES), prefix=PREFIX, progress=progress)
        recalls: dict[str, float] = {}
        for name in CACHES:
            recalls[name] = recall(model, self.recall, self.answers, name)
            if progress is not None:
                progress(len(self.recall))
        shape = ModelShape.from_config(model.config)
        baseline = [token.id for token in made[FULL_PRECISION].tokens]
        columns = []
        for name, one in made.items():
            used, full = cache_nbytes(one.cache), full_precision_nbytes(one.cache)
            long = shape.nbytes("bf16" if name == FULL_PRECISION else name, LONG_CONTEXT)
            columns.append(
                CacheResult(
                    name=name,
                    text=one.text,
                    nbytes=used,
                    ratio=full / used,
                    bits_per_element=16 * used / full,
                    page_bits_per_element=_page_bits(one.cache),
                    long_context_ratio=shape.nbytes("bf16", LONG_CONTEXT) / long,
                    perplexity=scores[name].perplexity,
                    recall=recalls[name],
                    agreement=scores[name].agreement,
                    same_tokens=sum(t.id == id for t, id in zip(one.tokens, baseline)),
                    tokens_per_second=tokens_per_second(one.tokens),
                )
            )
        return DemoResult(
            dtype=self.loaded.dtype,
            prompt=self.prompt,
            prompt_tokens=self.prompt_ids.shape[1],
            new_tokens=len(baseline),
            long_context=LONG_CONTEXT,
            scored_windows=len(self.text),
            scored_tokens=scores[FULL_PRECISION].tokens,
            recall_windows=len(self.recall),
            recall_answers=self.answers[..., 0].numel(),
            caches=columns,
        )


def _tokens(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _page_bits(cache: Cache) -> float | None:
    for layer in cache.layers:
        if isinstance(layer, OscarLayer) and layer.packed is not None:
            return layer.packed.layout.bits_per_element
    return None
