"""The terminal side of ``oscar-kv chat``: messages in, answers out, and what the cache costs."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from oscar_kv.chat import Conversation
from oscar_kv.generation import Footprint, Token, tokens_per_second
from oscar_kv.progress import progress_display, say
from oscar_kv.render import size
from oscar_kv.user_input import LineInput, read_text

COMMANDS = """\
/file FILE   put a text file in front of the next message
/save FILE   write the conversation and its cache to one file
/load FILE   continue a conversation that was saved
/reset       forget everything that was said
/help        this list
/quit        leave; so does the end of the input
A pasted block is one message. Ctrl-C stops an answer and keeps what there is of it."""


class Chat:
    """Reads messages until there are no more. Mistakes are said and end nothing.

    Args:
        conversation: which goes on here.
        max_new_tokens: of an answer.
        choose: what takes the next token from logits.
    """

    def __init__(
        self,
        conversation: Conversation,
        max_new_tokens: int,
        choose: Callable[[Tensor], Tensor],
    ) -> None:
        self.conversation = conversation
        self.max_new_tokens = max_new_tokens
        self.choose = choose
        self._files: list[str] = []
        """Texts that go in front of the next message."""

    def run(self) -> None:
        """Returns after ``/quit``, or at the end of the input."""
        lines = LineInput()
        while (text := lines.read()) is not None:
            try:
                if text.startswith("/") and "\n" not in text:
                    if not self._command(text):
                        return
                elif text:
                    self._answer(text)
            except BrokenPipeError:  # nobody reads the answers
                raise
            except (ValueError, TypeError, OSError, MemoryError) as error:
                say(f"error: {' '.join(str(error).split())}")
            except KeyboardInterrupt:
                say("stopped")

    def add_file(self, path: str | Path) -> None:
        """Puts a text file in front of the next message.

        Raises:
            ValueError: if it cannot be read, is no text, or is too long for the model.
        """
        files = [*self._files, f"{Path(path).name}:\n\n{read_text(path)}"]
        prompt = self.conversation.prompt("\n\n".join(files), self.max_new_tokens)
        self._files = files
        say(f"{path} goes in front of your next message: {len(prompt):,} tokens in all so far")

    def _command(self, line: str) -> bool:
        """Runs a command; False if it is the last one."""
        name, _, argument = line.partition(" ")
        path = os.path.expanduser(argument.strip())
        if name in ("/file", "/save", "/load") and not path:
            raise ValueError(f"{name}: expected the name of a file")
        conversation = self.conversation
        if name == "/file":
            self.add_file(path)
        elif name == "/save":
            why = conversation.save(path)
            state = "with its cache" if why is None else f"without its cache: {why}"
            say(f"saved {len(conversation.messages)} messages to {path}, {state}")
        elif name == "/load":
            why = conversation.load(path)
            state = "with its cache" if why is None else f"to be read again: {why}"
            say(f"loaded {len(conversation.messages)} messages, {state}")
        elif name == "/reset":
            conversation.reset()
            self._files = []
        elif name == "/help":
            print(COMMANDS)
        elif name != "/quit":
            raise ValueError(f"{name}: no such command; /help lists them")
        return name != "/quit"

    def _answer(self, text: str) -> None:
        tokens: list[Token] = []
        shown = ""
        message = "\n\n".join([*self._files, text])
        reply = self.conversation.reply(message, self.max_new_tokens, self.choose)
        with contextlib.closing(reply), _first_interrupt() as stop:
            with progress_display() as progress:
                progress.add_task("reading", total=None)
                first = next(reply)
            answer = ""
            for token, answer in itertools.chain([first], reply):
                tokens.append(token)
                whole = answer.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character, so far
                if len(whole) > len(shown):
                    print(whole[len(shown) :], end="", flush=True)
                    shown = whole
                if stop.is_set():
                    break
            print(answer[len(shown) :])
        self._files = []
        say(self._status(tokens))

    def _status(self, tokens: list[Token]) -> str:
        conversation = self.conversation
        takes, speed = Footprint.of(conversation.cache), tokens_per_second(tokens)
        rate = "" if speed is None else f", {speed:.1f} tokens/s"
        return (
            f"{takes.tokens:,} tokens in {size(takes.used)} ({conversation.preset}), "
            f"{size(takes.full_precision)} in {conversation.loaded.dtype}{rate}"
        )


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
