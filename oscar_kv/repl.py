"""The terminal side of ``oscar-kv chat``: lines in, answers out, and what the cache costs."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from oscar_kv.chat import Conversation
from oscar_kv.generation import Token, tokens_per_second
from oscar_kv.render import size

COMMANDS = """\
/save FILE   write the conversation to FILE and its cache beside it
/load FILE   continue a conversation that was saved
/reset       forget everything that was said
/help        this list
/quit        leave; so does the end of the input
Ctrl-C stops an answer and keeps what there is of it."""


def chat(conversation: Conversation, max_new_tokens: int, temperature: float) -> None:
    """Reads lines until there are no more. Mistakes are said and end nothing."""
    out = Console(highlight=False)
    while (line := _read_line(out)) is not None:
        try:
            if line.startswith("/"):
                if not _command(conversation, line, out):
                    return
            elif line:
                _answer(conversation, line, max_new_tokens, temperature, out)
        except (ValueError, OSError, MemoryError) as error:
            _say(f"error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            _say("stopped")


def _read_line(out: Console) -> str | None:
    try:
        return out.input("[bold]> [/bold]" if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        return ""


def _command(conversation: Conversation, line: str, out: Console) -> bool:
    """Runs a command; False if it is the last one."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/save", "/load") and not argument:
        raise ValueError(f"{name}: expected the name of a file")
    if name == "/save":
        conversation.save(argument)
        _say(f"saved {len(conversation.messages)} messages and {len(conversation.ids):,} tokens")
    elif name == "/load":
        kept = conversation.load(argument)
        state = "with its cache" if kept else "its cache will be made again"
        _say(f"loaded {len(conversation.messages)} messages, {state}")
    elif name == "/reset":
        conversation.reset()
    elif name == "/help":
        out.print(COMMANDS, markup=False)
    elif name != "/quit":
        raise ValueError(f"{name}: no such command; /help lists them")
    return name != "/quit"


def _answer(
    conversation: Conversation, text: str, max_new_tokens: int, temperature: float, out: Console
) -> None:
    tokens: list[Token] = []
    shown = ""

    def status() -> str:
        speed = tokens_per_second(tokens)
        rate = "" if speed is None else f", {speed:.1f} tokens/s"
        count = conversation.cache.get_seq_length()
        return f"{count:,} tokens in {size(conversation.nbytes)} ({conversation.preset}){rate}"

    reply = conversation.reply(text, max_new_tokens, temperature)
    with contextlib.closing(reply), _first_interrupt() as stop, _display(out) as show:
        for token, answer in reply:
            tokens.append(token)
            show(answer[len(shown) :], answer, status())
            shown = answer
            if stop.is_set():
                break
    _say(status())


Show = Callable[[str, str, str], None]
"""Shows an answer: what is new of it, all of it, and the status line."""


@contextlib.contextmanager
def _display(out: Console) -> Iterator[Show]:
    if not out.is_terminal:
        yield lambda new, answer, status: out.print(new, end="", markup=False)
        out.print()
        return
    with Live(console=out, refresh_per_second=8, vertical_overflow="visible") as live:
        last = Text()

        def show(new: str, answer: str, status: str) -> None:
            nonlocal last
            last = Text(answer)
            live.update(Group(last, Text(status, style="dim")))

        try:
            yield show
        finally:
            live.update(last)


@contextlib.contextmanager
def _first_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step of the model is not torn apart; the
    second one interrupts as usual."""
    event = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
