"""A conversation in a file: taken up with its cache where that fits, and nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from talks import FIRST, SECOND, say, tokens_read
from transformers import AutoModelForCausalLM, LlamaConfig

from oscar_kv.chat import Conversation
from oscar_kv.config import FULL_PRECISION
from oscar_kv.demo import MODEL
from oscar_kv.generation import Loaded, load, quiet
from oscar_kv.integrations.files import save_cache
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.saved_conversation import SavedConversation
from oscar_kv.storage import files


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    quiet()
    return load(MODEL, "float32", "cpu")


@pytest.fixture
def read(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return tokens_read(loaded, monkeypatch)


@pytest.mark.parametrize("name", ["talk", "talk.1", "talk.json", "two words.naïve"])
def test_taken_up_again(loaded: Loaded, read: list[int], tmp_path: Path, name: str) -> None:
    conversation = Conversation(loaded, "quality", system="# Python\n" * 60)
    with pytest.raises(ValueError, match="nothing was said"):
        conversation.save(tmp_path / name)
    say(conversation, FIRST)
    assert conversation.save(tmp_path / name) is None
    assert os.listdir(tmp_path) == [name]
    other = Conversation(loaded, "quality")
    assert other.load(tmp_path / name) is None
    assert (other.system, other.messages) == (conversation.system, conversation.messages)
    read.clear()
    answer = say(other, SECOND)
    assert read[0] < 30  # the cache was taken up
    assert answer == say(conversation, SECOND)
    assert other.save(tmp_path / name) is None  # over the earlier one
    assert SavedConversation.read(tmp_path / name).messages == other.messages


def test_two_names_are_two_conversations(loaded: Loaded, tmp_path: Path) -> None:
    """Also where both have as many tokens."""
    said = {"talk.1": "import re", "talk.2": "import io"}
    for name, text in said.items():
        conversation = Conversation(loaded, "compact")
        say(conversation, text)
        assert conversation.save(tmp_path / name) is None
    lengths = {len(SavedConversation.read(tmp_path / name).ids) for name in said}
    assert len(lengths) == 1
    for name, text in said.items():
        again = Conversation(loaded, "compact")
        assert again.load(tmp_path / name) is None
        assert again.messages[0]["content"] == text
        fresh = Conversation(loaded, "compact")
        say(fresh, text)
        assert say(again, SECOND) == say(fresh, SECOND)


def test_without_a_cache_that_fits_all_is_read_again(
    loaded: Loaded, read: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(loaded, "compact")
    say(conversation, FIRST)
    path = tmp_path / "talk"
    conversation.save(path)
    whole = len(conversation.ids)

    def reason(preset: str, loaded: Loaded = loaded) -> str:
        other = Conversation(loaded, preset)
        why = other.load(path)
        assert other.messages == conversation.messages
        assert other.ids == []
        return str(why)

    assert "of the preset compact, this chat's high" in reason("high")
    assert "without a cache" in reason(FULL_PRECISION)
    half = Loaded(load(MODEL, "bfloat16", "cpu").model, loaded.tokenizer)
    assert "dtype" in reason("compact", half)
    config = LlamaConfig(**{**loaded.model.config.to_dict(), "num_hidden_layers": 2})
    shallow: Any = AutoModelForCausalLM.from_config(config)
    why = reason("compact", Loaded(shallow, loaded.tokenizer))
    assert "num_hidden_layers=8" in why
    with monkeypatch.context() as patch:  # a conversation is the tokens that a template makes of it
        template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
        patch.setattr(loaded.tokenizer, "chat_template", template)
        assert "in other tokens" in reason("compact")

    written = path.read_bytes()
    path.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    assert "damaged" in reason("compact")  # and the messages are still there
    path.write_bytes(written)
    about = files.read_about(path)
    about["conversation"]["ids"].append(1)
    assert isinstance(conversation.cache, OscarCache)
    save_cache(conversation.cache, path, loaded.model, about=about)
    assert "another number of tokens" in reason("compact")

    again = Conversation(loaded, "compact")
    again.load(path)
    read.clear()
    say(again, SECOND)
    assert read[0] > whole


def test_without_a_file_format_the_words_are_kept(loaded: Loaded, tmp_path: Path) -> None:
    conversation = Conversation(loaded, FULL_PRECISION)
    say(conversation, FIRST)
    assert "full precision" in str(conversation.save(tmp_path / "full"))
    again = Conversation(loaded, "compact")
    assert "without a cache" in str(again.load(tmp_path / "full"))
    assert again.messages == conversation.messages
    again._drop_cache()  # as after a failure
    assert "the cache is empty" in str(again.save(tmp_path / "empty"))
    assert SavedConversation.read(tmp_path / "empty").messages == conversation.messages


def test_other_files_are_left_alone(loaded: Loaded, tmp_path: Path) -> None:
    conversation = Conversation(loaded, "compact")
    say(conversation, FIRST)
    earlier = {"system": [], "messages": conversation.messages, "ids": conversation.ids}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier, indent=1))
    (tmp_path / "text").write_text("words")
    (tmp_path / "nothing").touch()
    (tmp_path / "cut").write_bytes(b"\x00" * 20)
    (tmp_path / "link").symlink_to("text")
    save_file({"weight": torch.zeros(3)}, str(tmp_path / "model.safetensors"))
    save_file({"weight": torch.zeros(3)}, str(tmp_path / "named.safetensors"), {"format": "pt"})
    assert isinstance(conversation.cache, OscarCache)
    # ours, but not said by anyone
    save_cache(conversation.cache, tmp_path / "prompt.safetensors", loaded.model)
    files.save_packed(tmp_path / "odd", {}, about={"conversation": {"messages": 1}})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in before:
        with pytest.raises(ValueError, match="is no saved conversation: it stays as it is"):
            conversation.save(path)
        with pytest.raises(ValueError, match=r"is not a saved conversation|earlier version"):
            conversation.load(path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="an earlier version, which wrote two files"):
        conversation.load(tmp_path / "earlier.json")
    for nowhere in ("nowhere", ".", "/dev/zero"):
        with pytest.raises(OSError, match=r"no such file|is a folder"):
            conversation.load(tmp_path / nowhere)
    assert len(conversation.messages) == 2
    assert say(conversation, SECOND)


def test_a_full_disk_leaves_the_earlier_conversation(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(loaded, "compact")
    say(conversation, FIRST)
    conversation.save(tmp_path / "talk")
    before = (tmp_path / "talk").read_bytes()
    say(conversation, SECOND)

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def half(tensors: object, name: str, metadata: object, error: Any = error) -> None:
            Path(name).write_bytes(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(files, "save_file", half)
            with pytest.raises(type(error), match=r"cannot write '.*talk': No space left|^$"):
                conversation.save(tmp_path / "talk")
        assert os.listdir(tmp_path) == ["talk"]
        assert (tmp_path / "talk").read_bytes() == before
    conversation.save(tmp_path / "talk")
    assert len(SavedConversation.read(tmp_path / "talk").messages) == 4
