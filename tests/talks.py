"""What tests of conversations say, and a look at what the model reads."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from oscar_kv.chat import Conversation
from oscar_kv.generation import Loaded

FIRST, SECOND = "import os\ndef read(path):\n    with open(path) as", "def write(path, text):\n"


def say(conversation: Conversation, text: str, count: int = 12) -> str:
    """The answer to ``text``, of ``count`` tokens."""
    return [answer for _, answer in conversation.reply(text, count)][-1]


def tokens_read(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of the model reads from now on."""
    lengths: list[int] = []
    forward = loaded.model.forward

    def counted(input_ids: Tensor, **others: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(input_ids, **others)

    monkeypatch.setattr(loaded.model, "forward", counted)
    return lengths
