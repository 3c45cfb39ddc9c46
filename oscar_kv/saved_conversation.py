"""A conversation and its cache in one safetensors file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oscar_kv.generation import Message
from oscar_kv.integrations.files import save_cache
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.storage.files import read_about, save_packed

_KEY = "conversation"


@dataclass(frozen=True)
class SavedConversation:
    """What a file holds beside the cache."""

    model: str
    """Folder or id of the model that answered."""
    preset: str
    system: list[Message]
    messages: list[Message]
    ids: list[int]
    """The tokens in the cache."""

    def write(self, path: str | Path, cache: OscarCache | None, model: Any) -> str | None:
        """Writes the file, with ``cache`` of ``model`` if that has a file format.

        A file that is there is replaced if it is a saved conversation, and left alone if not.

        Returns:
            Why the cache is not in the file; ``None`` if it is.

        Raises:
            ValueError: if another kind of file is there.
            OSError: if the file cannot be written; an earlier one is as it was.
        """
        if Path(path).is_file():
            try:
                self.read(path)
            except ValueError as error:
                raise ValueError(
                    f"{path} is there and is no saved conversation: it stays as it is; choose "
                    "another name"
                ) from error
        about = {_KEY: asdict(self)}
        why = "a cache in full precision has no file format"
        if cache is not None:
            try:
                return save_cache(cache, path, model, about=about)
            except ValueError as error:  # of a hybrid model, or empty after a failure
                why = str(error)
        save_packed(path, {}, about=about)
        return why

    @classmethod
    def read(cls, path: str | Path) -> SavedConversation:
        """What :meth:`write` wrote, without the cache.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not a saved conversation.
        """
        try:
            saved = read_about(path)[_KEY]
            system, messages = (
                [{"role": str(m["role"]), "content": str(m["content"])} for m in saved[part]]
                for part in ("system", "messages")
            )
            ids = [int(number) for number in saved["ids"]]
            if not messages:
                raise ValueError("no messages")
            return cls(str(saved["model"]), str(saved["preset"]), system, messages, ids)
        except (KeyError, TypeError, ValueError) as error:
            why = "is not a saved conversation, or is damaged"
            if _is_of_the_two_files_before(path):
                why = "is of an earlier version, which wrote two files: it is no longer read"
            raise ValueError(f"{path} {why}") from error


def _is_of_the_two_files_before(path: str | Path) -> bool:
    """Whether a file begins as the JSON half of what was written before there was one file."""
    begins = b'{\n "system"'
    with Path(path).open("rb") as file:
        return file.read(len(begins)) == begins
