"""A conversation reads only what is new, and survives whatever happens during an answer."""

from __future__ import annotations

import io
import json
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oscar_kv import OscarCache, OscarConfig, repl, save_cache
from oscar_kv.chat import Conversation
from oscar_kv.cli import main
from oscar_kv.config import FULL_PRECISION
from oscar_kv.demo import MODEL
from oscar_kv.generation import Loaded, load, quiet

FIRST, SECOND = "import os\ndef read(path):\n    with open(path) as", "def write(path, text):\n"
THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}# dropped\n"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
"""A template that leaves earlier answers out."""


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    quiet()
    return load(MODEL, "float32", "cpu")


@pytest.fixture
def read(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of the model read."""
    lengths: list[int] = []
    forward = loaded.model.forward

    def counted(input_ids: Tensor, **others: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(input_ids, **others)

    monkeypatch.setattr(loaded.model, "forward", counted)
    return lengths


def say(conversation: Conversation, text: str, count: int = 12) -> str:
    return [answer for _, answer in conversation.reply(text, count)][-1]


def test_only_what_is_new_is_read(loaded: Loaded, read: list[int]) -> None:
    conversation = Conversation(loaded, FULL_PRECISION)
    say(conversation, FIRST)
    prompt = len(loaded.encode(FIRST)[0])
    assert read == [prompt, *[1] * 11]
    assert len(conversation.ids) == prompt + 11 == conversation.cache.get_seq_length()
    read.clear()
    answer = say(conversation, SECOND)
    whole = "\n\n".join(m["content"] for m in conversation.messages[:3])
    assert read[0] <= len(loaded.encode(whole)[0]) - prompt
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    # as a model that reads it all at once answers
    assert say(Conversation(loaded, FULL_PRECISION), whole) == answer


def test_a_packed_cache_serves_many_turns(loaded: Loaded) -> None:
    conversation = Conversation(loaded, "compact", system="# Python\n" * 60)
    for turn in range(3):
        say(conversation, SECOND * 5, 30)
        assert len(conversation.messages) == 2 * turn + 2
        assert conversation.cache.get_seq_length() == len(conversation.ids) > 300 * (turn > 1)
    conversation.reset()
    assert not conversation.messages
    assert conversation.system
    assert conversation.nbytes == 0


def test_a_template_may_drop_what_the_cache_holds(
    loaded: Loaded, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", THOUGHTS)
    conversation = Conversation(loaded, FULL_PRECISION)
    say(conversation, FIRST)
    read.clear()
    answer = say(conversation, SECOND)
    assert read[0] < 30  # all but the first message, of which the start is kept
    fresh = Conversation(loaded, FULL_PRECISION)
    fresh.messages = conversation.messages[:2]
    assert say(fresh, SECOND) == answer


def test_an_answer_cut_short_is_kept(loaded: Loaded) -> None:
    conversation = Conversation(loaded, "compact")
    with closing(conversation.reply(FIRST, 100)) as reply:
        answers = [next(reply)[1] for _ in range(4)]
    assert conversation.messages[-1] == {"role": "assistant", "content": answers[-1]}
    assert conversation.cache.get_seq_length() == len(conversation.ids)
    assert say(conversation, SECOND)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failed_step_leaves_the_conversation_as_it_was(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    conversation = Conversation(loaded, FULL_PRECISION)
    say(conversation, FIRST)
    messages = list(conversation.messages)
    expected = say(_copy(conversation), SECOND)
    layer = loaded.model.model.layers[1].mlp
    with monkeypatch.context() as patch:  # after the first layer has stored the new tokens
        patch.setattr(layer, "forward", lambda x: (_ for _ in ()).throw(error("injected")))
        with pytest.raises(error, match="injected"):
            say(conversation, SECOND)
    assert conversation.messages == messages
    assert say(conversation, SECOND) == expected


def _copy(conversation: Conversation) -> Conversation:
    copy = Conversation(conversation.loaded, conversation.preset)
    copy.messages = list(conversation.messages)
    return copy


def test_a_context_that_is_too_short_is_refused(loaded: Loaded) -> None:
    conversation = Conversation(loaded, "compact")
    with pytest.raises(ValueError, match="exceed the model's context"):
        say(conversation, FIRST, 10**6)
    assert not conversation.messages


def test_saved_and_taken_up_again(loaded: Loaded, read: list[int], tmp_path: Path) -> None:
    conversation = Conversation(loaded, "quality", system="# Python\n" * 60)
    with pytest.raises(ValueError, match="nothing was said"):
        conversation.save(tmp_path / "talk.json")
    say(conversation, FIRST)
    conversation.save(tmp_path / "talk.json")
    other = Conversation(loaded, "quality")
    assert other.load(tmp_path / "talk.json")
    read.clear()
    answer = say(other, SECOND)
    assert read[0] < 30  # the cache was taken up
    assert answer == say(conversation, SECOND)

    assert not Conversation(loaded, "high").load(tmp_path / "talk.json")  # another cache
    config = loaded.model.config
    mixed = OscarCache(config, OscarConfig.quality(), layers={1: OscarConfig.high()})
    ids = json.loads((tmp_path / "talk.json").read_text())["ids"]
    loaded.model(torch.tensor([ids]), past_key_values=mixed)
    save_cache(mixed, tmp_path / "talk.safetensors", loaded.model)
    assert not Conversation(loaded, "quality").load(tmp_path / "talk.json")  # in one layer
    (tmp_path / "talk.safetensors").unlink()
    again = Conversation(loaded, "quality")
    assert not again.load(tmp_path / "talk.json")
    assert again.messages == other.messages[:2]
    assert say(again, SECOND)


def test_damaged_files_change_nothing(loaded: Loaded, tmp_path: Path) -> None:
    conversation = Conversation(loaded, "compact")
    say(conversation, FIRST)
    conversation.save(tmp_path / "talk.json")
    before = list(conversation.messages)
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"messages": [], "ids": []}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="not a conversation"):
            conversation.load(tmp_path / name)
    (tmp_path / "talk.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"talk\.safetensors"):
        conversation.load(tmp_path / "talk.json")
    with pytest.raises(OSError, match="nowhere"):
        conversation.load(tmp_path / "nowhere")
    assert conversation.messages == before
    assert say(conversation, SECOND)


def typed(
    lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """What ``oscar-kv chat`` says on stdout and stderr to these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as end:
        main(["chat", "--model", str(MODEL), "--max-new-tokens", "5", "--dtype", "float32"])
    assert not end.value.code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    lines = (
        f"/save {file}\n{SECOND}\n\n/save {file}\n/reset\n/load {file}\n/help\n/nonsense\n/load\n"
    )
    out, err = typed(lines + SECOND, monkeypatch, capsys)
    assert json.loads(file.read_text())["messages"][0]["content"] == SECOND.strip()
    assert "/quit" in out
    for said in (
        "error: nothing was said yet",
        "(compact)",
        "saved 2 messages",
        "loaded 2 messages, with its cache",
        "error: /nonsense: no such command",
        "error: /load: expected the name of a file",
    ):
        assert said in err
    out, err = typed(f"/quit\n{SECOND}", monkeypatch, capsys)
    assert out == err == ""


def test_the_first_interrupt_waits_for_the_token() -> None:
    # a run in the background starts with interrupts ignored
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with repl._first_interrupt() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
