"""A conversation that keeps its cache from turn to turn.

Only what is new is read: the tokens of the conversation so far that the cache holds stay there. If
they no longer are how the conversation is written (a chat template may drop an earlier turn's
thoughts), the cache is cut back to where both agree.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from oscar_kv.config import FULL_PRECISION
from oscar_kv.evaluation.quality import make_cache
from oscar_kv.generation import (
    Loaded,
    Message,
    Token,
    check_length,
    continuation,
    decode_graph,
)
from oscar_kv.integrations.files import load_cache
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.sampling import greedy
from oscar_kv.saved_conversation import SavedConversation

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

    def reset(self) -> None:
        """Forgets everything that was said."""
        self.messages = []
        self._drop_cache()

    def prompt(self, text: str, max_new_tokens: int) -> list[int]:
        """The tokens of the conversation if ``text`` is said next, up to the answer.

        Raises:
            ValueError: if the model's context cannot hold them and the answer.
        """
        messages = [*self.system, *self.messages, _message("user", text)]
        ids = self._encode(messages)
        check_length(self.loaded.model.config, len(ids), max_new_tokens)
        return ids

    def reply(
        self, text: str, max_new_tokens: int, choose: Callable[[Tensor], Tensor] = greedy
    ) -> Generator[tuple[Token, str], None, None]:
        """Says ``text`` and yields the answer: every token, and the whole answer so far.

        An answer may be cut short by closing the iterator; what there is of it is kept. If anything
        goes wrong, the conversation is as before, and its cache is made again when it is needed.

        Raises:
            ValueError: if the model's context cannot hold the conversation and the answer.
            MemoryError: if the device runs out of memory.
        """
        wanted = self.prompt(text, max_new_tokens)
        self._keep(_common_prefix(self.ids, wanted[:-1]))
        ids = torch.tensor([wanted], device=self.loaded.model.device)
        before, new = ids[:, : len(self.ids)], ids[:, len(self.ids) :]
        stream = continuation(
            self.loaded.model,
            new,
            self.cache,
            max_new_tokens,
            choose,
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
        self.messages += [_message("user", text), _message("assistant", answer)]

    def save(self, path: str | Path) -> str | None:
        """Writes the conversation and its cache to one file, in one step.

        Returns:
            Why the cache is not in the file; ``None`` if it is.

        Raises:
            ValueError: if nothing was said, or a file is there that is no saved conversation.
            OSError: if the file cannot be written; an earlier one is as it was.
        """
        if not self.messages:
            raise ValueError("nothing was said yet")
        name = self.loaded.model.name_or_path
        saved = SavedConversation(name, self.preset, self.system, self.messages, self.ids)
        cache = self.cache if isinstance(self.cache, OscarCache) else None
        return saved.write(path, cache, self.loaded.model)

    def load(self, path: str | Path) -> str | None:
        """Takes up the conversation of a file; this one stays if that fails.

        Returns:
            Why the next reply reads all of it again; ``None`` if its cache was taken up.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not a saved conversation.
        """
        saved = SavedConversation.read(path)
        cache, why = self._saved_cache(path, saved)
        self._drop_cache()
        self.system, self.messages = saved.system, saved.messages
        if cache is not None:
            self._use(cache, saved.ids)
        return why

    def _saved_cache(
        self, path: str | Path, saved: SavedConversation
    ) -> tuple[OscarCache | None, str | None]:
        """The cache in a file, or why it cannot be taken up here."""
        if not saved.ids or FULL_PRECISION in (saved.preset, self.preset):
            return None, "it comes without a cache"
        if saved.preset != self.preset:
            return None, f"its cache is of the preset {saved.preset}, this chat's {self.preset}"
        # what was read for the last answer, as this model's tokenizer and template write it
        prompt = self._encode([*saved.system, *saved.messages[:-1]])
        if saved.ids[: len(prompt)] != prompt:
            return None, f"{saved.model} wrote it in other tokens than this model does"
        try:
            cache = load_cache(path, self.loaded.model)
        except ValueError as error:
            return None, str(error)
        if cache.get_seq_length() != len(saved.ids):
            return None, "the file is damaged: its cache holds another number of tokens"
        return cache, None

    def _encode(self, messages: list[Message]) -> list[int]:
        if self.loaded.has_chat_template:
            return self.loaded.encode_chat(messages)[0].tolist()
        return self.loaded.encode("\n\n".join(m["content"] for m in messages))[0].tolist()

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


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
