"""A conversation that keeps its cache from turn to turn.

Only what is new is read: the tokens of the conversation so far that the cache holds stay there. If
they no longer are how the conversation is written (a chat template may drop an earlier turn's
thoughts), the cache is cut back to where both agree.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from oscar_kv.config import FULL_PRECISION, OscarConfig
from oscar_kv.evaluation.quality import make_cache
from oscar_kv.generation import (
    Loaded,
    Token,
    cache_nbytes,
    check_length,
    continuation,
    decode_graph,
)
from oscar_kv.integrations.files import load_cache, save_cache
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.transformers import OscarCache

Message = dict[str, str]

SPARE_TOKENS = 2048
"""Reserved beyond an answer when a CUDA graph is captured, which then serves several turns."""


class Conversation:
    """Messages, and a cache of the tokens that they are.

    Args:
        loaded: the model; its tokenizer's chat template is used if it has one, else messages are
            paragraphs of one text.
        preset: of the cache, or ``FULL_PRECISION``.
        system: the first message, if there is to be one.
        cuda_graph: see :func:`oscar_kv.generation.decode_graph`.

    Raises:
        ValueError: if a graph is wanted and cannot be had.
    """

    def __init__(
        self,
        loaded: Loaded,
        preset: str,
        system: str | None = None,
        *,
        cuda_graph: bool | None = None,
    ) -> None:
        self.loaded = loaded
        self.preset = preset
        self.cuda_graph = cuda_graph
        self.system: list[Message] = [] if system is None else [_message("system", system)]
        self.messages: list[Message] = []
        """What was said, without the system message."""
        self.ids: list[int] = []
        """The tokens in the cache."""
        self._drop_cache()

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return cache_nbytes(self.cache)

    def reset(self) -> None:
        """Forgets everything that was said."""
        self.messages = []
        self._drop_cache()

    def reply(
        self, text: str, max_new_tokens: int, temperature: float = 0.0
    ) -> Generator[tuple[Token, str], None, None]:
        """Says ``text`` and yields the answer: every token, and the whole answer so far.

        An answer may be cut short by closing the iterator; what there is of it is kept. If anything
        goes wrong, the conversation is as before, and its cache is made again when it is needed.

        Raises:
            ValueError: if the model's context cannot hold the conversation and the answer.
            MemoryError: if the device runs out of memory.
        """
        question = _message("user", text)
        wanted = self._encode([*self.messages, question])
        check_length(self.loaded.model.config, len(wanted), max_new_tokens)
        self._keep(_common_prefix(self.ids, wanted[:-1]))
        ids = torch.tensor([wanted], device=self.loaded.model.device)
        before, new = ids[:, : len(self.ids)], ids[:, len(self.ids) :]
        stream = continuation(
            self.loaded.model,
            new,
            self.cache,
            max_new_tokens,
            temperature,
            graph=self._graph,
            spare=SPARE_TOKENS,
            before=before,
        )
        generated: list[int] = []
        answer = ""
        try:
            for token in stream:
                generated.append(token.id)
                answer = self.loaded.tokenizer.decode(generated, skip_special_tokens=True)
                yield token, answer
        except GeneratorExit:  # the caller has had enough, between two tokens
            pass
        except BaseException:
            self._drop_cache()  # some of its layers may have seen a token that others have not
            raise
        self.ids = [*wanted, *generated][: self.cache.get_seq_length()]
        self.messages += [question, _message("assistant", answer)]

    def save(self, path: str | Path) -> None:
        """Writes the conversation to ``path``, as JSON, and its cache beside it.

        Raises:
            ValueError: if nothing was said, or the cache has no file format.
            OSError: if a file cannot be written.
        """
        if not self.messages:
            raise ValueError("nothing was said yet")
        if self.preset != FULL_PRECISION:
            save_cache(self._oscar_cache(), _beside(path), self.loaded.model)
        state = {"system": self.system, "messages": self.messages, "ids": self.ids}
        Path(path).write_text(json.dumps(state, indent=1, ensure_ascii=False), encoding="utf-8")

    def load(self, path: str | Path) -> bool:
        """Takes up the conversation at ``path``; this one stays if that fails.

        Returns:
            Whether its cache was there, too, and fits. Otherwise the next reply reads it all again.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not a conversation, or the cache beside it is damaged.
        """
        try:
            state: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            system, messages, ids = (state[key] for key in ("system", "messages", "ids"))
            said = [_message(m["role"], m["content"]) for m in [*system, *messages]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a conversation ({error})") from error
        cache = None
        if self.preset != FULL_PRECISION and _beside(path).is_file():
            cache = load_cache(_beside(path), self.loaded.model)
            wanted = _configs(self._oscar_cache())
            if cache.get_seq_length() != len(ids) or _configs(cache) != wanted:
                cache = None
        self._drop_cache()
        self.system, self.messages = said[: len(system)], said[len(system) :]
        if cache is not None:
            self._use(cache, ids)
        return cache is not None

    def _encode(self, messages: list[Message]) -> list[int]:
        tokenizer, messages = self.loaded.tokenizer, [*self.system, *messages]
        if tokenizer.chat_template is None:
            return self.loaded.encode("\n\n".join(m["content"] for m in messages))[0].tolist()
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def _keep(self, count: int) -> None:
        """Cuts the cache back to its first ``count`` tokens, or to none if it cannot be cut."""
        surplus = len(self.ids) - count
        if surplus and count and all(layer.is_croppable for layer in self.cache.layers):
            self.cache.crop(-surplus)
            self.ids = self.ids[:count]
        elif surplus:
            self._drop_cache()

    def _drop_cache(self) -> None:
        self._use(make_cache(self.loaded.model, self.preset), [])

    def _use(self, cache: Cache, ids: list[int]) -> None:
        self.cache, self.ids = cache, ids
        self._graph = decode_graph(self.loaded.model, cache, self.cuda_graph)

    def _oscar_cache(self) -> OscarCache:
        assert isinstance(self.cache, OscarCache)
        return self.cache


def _configs(cache: OscarCache) -> list[OscarConfig]:
    """Of every quantized layer."""
    return [layer.config for layer in cache.layers if isinstance(layer, OscarLayer)]


def _message(role: str, content: str) -> Message:
    return {"role": str(role), "content": str(content)}


def _beside(path: str | Path) -> Path:
    return Path(path).with_suffix(".safetensors")


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
