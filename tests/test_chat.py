"""A conversation reads only what is new, and survives whatever happens during an answer."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from talks import FIRST, SECOND, say, tokens_read

from oscar_kv import repl
from oscar_kv.chat import Conversation
from oscar_kv.cli import main
from oscar_kv.config import FULL_PRECISION
from oscar_kv.demo import MODEL
from oscar_kv.generation import Loaded, cache_nbytes, load, quiet
from oscar_kv.saved_conversation import SavedConversation

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
    return tokens_read(loaded, monkeypatch)


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
    assert cache_nbytes(conversation.cache) == 0


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


Typed = Callable[..., tuple[str, str]]


@pytest.fixture
def typed(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Typed:
    """What ``oscar-kv chat`` says on stdout and stderr to lines from a pipe."""

    def call(lines: str | bytes, *options: object) -> tuple[str, str]:
        piped = io.BytesIO(lines if isinstance(lines, bytes) else lines.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped))
        monkeypatch.setattr("oscar_kv.generation.load", lambda *_: loaded)
        arguments = ["chat", "--model", str(MODEL), "--max-new-tokens", "5"]
        with pytest.raises(SystemExit) as end:
            main([*arguments, *map(str, options)])
        assert not end.value.code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


NOTE = "note: this model has no chat template: it may continue your text, not answer it\n"


def test_the_command(typed: Typed, tmp_path: Path) -> None:
    file = tmp_path / "talk"
    lines = (
        f"/save {file}\n{SECOND}\n\n/save {file}\n/reset\n/load {file}\n/help\n/nonsense\n/load\n"
    )
    out, err = typed(lines + SECOND)
    assert SavedConversation.read(file).messages[0]["content"] == SECOND.strip()
    assert "/quit" in out
    for said in (
        "error: nothing was said yet",
        "(compact)",
        f"saved 2 messages to {file}, with its cache",
        "loaded 2 messages, with its cache",
        "error: /nonsense: no such command",
        "error: /load: expected the name of a file",
    ):
        assert said in err
    assert typed(f"/quit\n{SECOND}") == ("", NOTE)


def test_what_cannot_be_saved_ends_nothing(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "weights").write_bytes(b"weights")
    refused = (
        f"{tmp_path}/none/talk",
        tmp_path,
        f"{tmp_path}/t/",
        "/dev/full",
        f"{tmp_path}/weights",
    )
    lines = [
        FIRST.split("\n")[0],
        *(f"/save {path}" for path in refused),
        "/save  ~/my talk ",
        SECOND,
    ]
    _, err = typed("\n".join(lines))
    assert err.count("error: ") == len(refused)
    assert (tmp_path / "weights").read_bytes() == b"weights"
    saved = SavedConversation.read(tmp_path / "home" / "my talk")
    assert [m["role"] for m in saved.messages] == ["user", "assistant"]
    assert err.count("tokens/s") == 2  # the conversation went on


def test_documents_go_in_front_of_the_next_message(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "doc.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    (tmp_path / "other.py").write_text("z = 3\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "long.py").write_text("x = 1\n" * 1500)
    (tmp_path / "system").write_text("# Python\n")
    lines = (
        *(f"/file {tmp_path}/{name}" for name in ("other.py", "binary", "long.py", "none")),
        "print(", "print(z", f"/save {tmp_path}/talk",
    )  # fmt: skip
    system, document = tmp_path / "system", tmp_path / "doc.py"
    _, err = typed("\n".join(lines), "--file", document, "--system-file", system)
    assert err.count("goes in front of your next message") == 2
    assert "binary' is not UTF-8 text" in err
    assert "long.py" not in err.replace(f"{tmp_path}/long.py", "")
    assert "exceed the model's context" in err
    assert "none': No such file" in err
    saved = SavedConversation.read(tmp_path / "talk")
    assert saved.system == [{"role": "system", "content": "# Python\n"}]
    asked = [m["content"] for m in saved.messages if m["role"] == "user"]
    assert asked == ["doc.py:\n\nx = 1\ny = 2\n\n\nother.py:\n\nz = 3\n\n\nprint(", "print(z"]


def test_bytes_that_are_no_text_end_nothing(typed: Typed) -> None:
    _, err = typed(b"caf\xe9\nimport os\n")
    assert err.count("tokens/s") == 2


def test_characters_of_several_tokens_are_printed_once(
    loaded: Loaded, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = iter(
        [
            "a",
            "a\N{REPLACEMENT CHARACTER}",
            "a\u4f1a",
            "a\u4f1ab",
            "a\u4f1ab\N{REPLACEMENT CHARACTER}",
        ]
    )
    monkeypatch.setattr(type(loaded.tokenizer), "decode", lambda *_, **__: next(decoded))
    assert typed("x")[0] == "a\u4f1ab\N{REPLACEMENT CHARACTER}\n"


def test_a_template_that_refuses_ends_nothing(
    loaded: Loaded, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('not that') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    _, err = typed("bad words\nimport os\n")
    assert err.startswith("error: the model's chat template does not take this: not that\n")
    assert "note" not in err  # it has a template
    assert err.count("tokens/s") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--system", "a", "--system-file", "b"), "only one of --system and --system-file"),
        (("--system-file", "{tmp}/none"), "none': No such file"),
        (("--file", "{tmp}/none"), "none': No such file"),
        (("--top-p", "0.9"), "set a temperature"),
        (("--model", "{tmp}/none"), "no such file or folder"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(
    options: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(SystemExit) as end:
        main(["chat", "--model", str(MODEL), *given])
    assert end.value.code == 2
    error = capsys.readouterr().err.removeprefix(NOTE)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


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
