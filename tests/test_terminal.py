"""The command line on a terminal: pasted blocks, edited lines, progress of downloads."""

from __future__ import annotations

import http.server
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oscar_kv.demo import MODEL
from oscar_kv.progress import loading

fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
ROOT = Path(__file__).parents[1]
PASTE = "\x1b[200~{}\x1b[201~"
CHAT = ("chat", "--model", str(MODEL), "--max-new-tokens", "2")


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, code: str, *args: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL + code, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment},
        )
        os.close(theirs)
        self._shown = ""
        self._behind = 0

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Until ``pattern`` appears behind what was waited for last."""
        end = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self._shown, self._behind)) is None:
            fresh = self._shown[self._behind :]
            ready, _, _ = select.select([self._ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} after {fresh[-500:]!r}"
            try:
                self._shown += os.read(self._ours, 1 << 16).decode(errors="replace")
            except OSError as error:  # the other side is closed
                raise AssertionError(f"ended without {pattern!r} after {fresh[-500:]!r}") from error
        self._behind = found.end()

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._ours)


OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
"""So that Ctrl-C is sent to the command."""
MAIN = "from oscar_kv.cli import main; main()"
READ = """
import sys
{before}
from oscar_kv.user_input import LineInput
lines = LineInput()
while (text := lines.read()) is not None:
    print("read", ascii(text))
"""


@contextmanager
def terminal(code: str, *args: str, **environment: str) -> Iterator[Terminal]:
    one = Terminal(code, *args, **environment)
    try:
        yield one
    finally:
        one.close()


def has_gnu_readline() -> bool:
    readline = pytest.importorskip("readline")
    return "libedit" not in (readline.__doc__ or "")


def test_lines_are_edited_and_a_pasted_block_is_one_message() -> None:
    if not has_gnu_readline():
        pytest.skip("this Python has no GNU readline")
    with terminal(READ.format(before="")) as one:
        one.wait_for("> ")
        one.type(PASTE.format("def f():\n    return 1\n\n/quit") + "\r")
        one.wait_for(r"read 'def f\(\):\\n    return 1\\n\\n/quit'")
        one.type("import oz\x7fs\r")
        one.wait_for("read 'import os'")
        one.type("one\rtwo\r")  # typed ahead
        one.wait_for("read 'one'")
        one.wait_for("read 'two'")
        one.type("\x1b[A\x1b[A\x1b[A\r")
        one.wait_for("read 'import os'")
        one.wait_for("> ")  # before it Ctrl-C would meet the script between two lines
        one.type("half a line")
        one.wait_for("half a line")
        time.sleep(1)  # readline sees a signal only while it waits for the next key
        one.type("\x03")
        one.wait_for("read ''")
        one.wait_for("> ")
        one.type("\x04")
        assert one.process.wait(30) == 0


def test_without_readline_lines_that_arrive_together_are_one_message() -> None:
    with terminal(READ.format(before="sys.modules['readline'] = None")) as one:
        one.wait_for("> ")
        one.type("def f():\n    return 1\n")
        one.wait_for(r"read 'def f\(\):\\n    return 1'")
        one.type("import os\n")
        one.wait_for("read 'import os'")
        one.wait_for("> ")
        one.type("\x04")
        assert one.process.wait(30) == 0


def test_a_chat(tmp_path: Path) -> None:
    """An answer, a command, and Ctrl-C, which ends the answer and not the chat."""
    with terminal(MAIN, *CHAT[:-1], "1500", OMP_NUM_THREADS="1") as one:
        one.wait_for("no chat template")
        one.wait_for("> ")
        one.type("def f(x):\r")
        one.wait_for("def f")
        time.sleep(1)
        one.type("\x03")
        one.wait_for(r"[\d,]+ tokens in .* \(compact\), .* in bfloat16")
        one.wait_for("> ")
        one.type(f"/save {tmp_path}/talk\r")
        one.wait_for(f"saved 2 messages to {tmp_path}/talk, with its cache")
        one.type("\x04")
        assert one.process.wait(30) == 0


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as is asked for one model, whose name is ``some/model``."""

    def _answer(self) -> None:
        named = re.fullmatch("/some/model/resolve/[^/]+/([^/]+)", self.path)
        file = MODEL / named[1] if named else MODEL
        found = file.is_file()
        body = file.read_bytes() if found else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        if found:
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        elif not body:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = _answer  # noqa: N815  the names that http.server asks for

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_downloads_show_how_far_they_are(hub: str, tmp_path: Path) -> None:
    given = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    args = ("generate", "--model", "some/model", "--prompt", "a", "--max-new-tokens", "2")
    with terminal(MAIN, *args, **given, HF_HUB_OFFLINE="0") as one:
        one.wait_for("loading some/model")
        one.wait_for(r"model\.safetensors: +100%")
        one.wait_for("KV cache of")
        assert one.process.wait(30) == 0


def test_elsewhere_there_is_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.utils.enable_progress_bars", pytest.fail)
    for model in ("some/model", str(MODEL)):
        with loading(model):
            pass
    assert capsys.readouterr() == ("", "")
