"""``oscar-kv eval`` as a command: what is written when, what is said, and what is refused."""

from __future__ import annotations

import json
import re
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from oscar_kv import cli_eval
from oscar_kv.cli import main
from oscar_kv.demo import MODEL
from oscar_kv.evaluation import evaluate, reference, report, runner
from oscar_kv.evaluation.cache import CONTENDERS, contender
from oscar_kv.evaluation.methods import KIVI
from oscar_kv.evaluation.subject import Subject, rows_of_array
from oscar_kv.evaluation.suites import SUITES
from oscar_kv.evaluation.tasks import TASKS, Perplexity

TASK = "perplexity:windows=2,length=384,prefix=256"
HELD_OUT = f"{MODEL / 'heldout.npz'}:text"


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def measure(out: Path, *names: str, task: str = TASK) -> int:
    methods = [part for name in names for part in ("--method", name)]
    return run("eval", "--out", out, "--dtype", "float32", "--task", task, *methods)


# -- the file -------------------------------------------------------------------------------


def test_what_is_interrupted_loses_the_method_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    calls, quantize = [0], KIVI.quantize

    def interrupted(self: KIVI, *states: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > 12:  # one block was tried first, eight layers are a window
            raise KeyboardInterrupt
        return quantize(self, *states, **named)

    with monkeypatch.context() as patch:
        patch.setattr(KIVI, "quantize", interrupted)
        assert measure(out, "full", "int4", "kivi", "fp8") == 130
    text = out.read_text()
    assert text.endswith("\n")
    assert [row["method"]["name"] for row in runner.read_rows(out)] == ["full", "int4"]
    assert measure(out, "full", "int4", "kivi", "fp8") == 0
    assert out.read_text().startswith(text)
    names = [row["method"]["name"] for row in runner.read_rows(out)]
    assert names == ["full", "int4", "kivi", "fp8"]


def test_a_row_is_written_before_the_next_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    found = evaluate(MODEL, ["full", "int4"], [TASK], tokens=HELD_OUT, out=out, dtype="float32")
    assert runner.read_rows(out) == found
    # as the command has it, bit for bit
    again = tmp_path / "again.jsonl"
    assert measure(again, "full", "int4") == 0
    for one, other in zip(runner.read_rows(again), found, strict=True):
        assert (one["key"], one["result"]) == (other["key"], other["result"])


@pytest.fixture
def row() -> dict[str, Any]:
    return {"key": "k", "model": {}, "task": {}, "method": {}, "result": {"loss": [0.5] * 100}}


@pytest.fixture
def file_limit() -> Iterator[Any]:
    """Lets files grow to so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_whole_lines(
    tmp_path: Path, row: dict[str, Any], file_limit: Any
) -> None:
    out = tmp_path / "rows.jsonl"
    runner.append_row(out, row)
    before = out.read_bytes()
    file_limit(len(before) + 100)
    with pytest.raises(ValueError, match=r"cannot write .*rows\.jsonl"):
        runner.append_row(out, row)
    assert out.read_bytes() == before


def test_ends_of_files(tmp_path: Path, row: dict[str, Any]) -> None:
    out = tmp_path / "rows.jsonl"
    line = json.dumps(row)
    for there, lines in (
        (line, [line, line]),  # an editor took the last end of a line
        (f"{line}\n{line[:50]}", [line, line]),  # a machine went down
        (line[:3], [line]),
        ("", [line]),
    ):
        out.write_text(there)
        assert len(runner.results_in(out)) == (1 if line in there else 0)
        runner.append_row(out, row)
        assert out.read_text().splitlines() == lines
    for there in ("notes", f"{line}\nnotes", f"notes\n{line}\n", '{"a": 1}'):
        out.write_text(there)
        with pytest.raises(ValueError, match=r"line [12]: not a result row"):
            runner.results_in(out)
        assert out.read_text() == there


def test_out_is_tried_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("oscar_kv.evaluation.subject.load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "notes.txt").write_text("remember the milk")
    for out, message in {
        tmp_path: f"cannot read {str(tmp_path)!r}: Is a directory",
        tmp_path / "file" / "rows.jsonl": "cannot write",
        Path("/proc/rows.jsonl"): "cannot write '/proc/rows.jsonl'",
        tmp_path / "notes.txt": "notes.txt, line 1: not a result row",
    }.items():
        assert measure(out, "full") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "remember the milk"


# -- what is said ---------------------------------------------------------------------------


def test_results_and_time_left_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_eval, "SECONDS_BETWEEN_LINES", 0.0)
    assert measure(tmp_path / "rows.jsonl", "full", "kivi") == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    kinds = [line.partition(":")[0] for line in lines[:-1]]
    assert kinds == ["perplexity"] * 2 + ["perplexity, full"] + ["perplexity"] * 2 + [
        "perplexity, kivi"
    ]
    assert re.fullmatch(r"perplexity: 1 of 4 steps, about \d+ s left", lines[0])
    assert re.search(r"1 of 2 results, about \d+ s left$", lines[2])
    assert re.fullmatch(
        r"perplexity, kivi: increase [+-].*% ± .* at [\d.]+ bits; 2 of 2 results", lines[5]
    )
    assert "2 results written, 0 were there" in lines[6]
    table = shown.out.splitlines()
    assert table[0].rstrip() == "demo, float32 on cpu, seed 0"
    assert re.split(r"\s{2,}", table[2].strip()) == [
        "method", "bits at 32K", "perplexity: increase",
    ]  # fmt: skip
    assert [line.split()[0] for line in table[4:6]] == ["full", "kivi"]
    assert re.search(r"full\s+16.00\s+\+0.00%", table[4])


def test_a_table_has_what_is_known() -> None:
    """Of two methods and tasks of which one was not measured, and a second model."""

    def made(name: str, task: dict[str, Any], result: dict[str, Any], model: str = "a") -> Any:
        return {
            "model": {"name": model, "dtype": "float32", "device": "cpu"}, "seed": 0, "task": task,
            "method": {"name": name}, "bits_per_element": 4.0, "quantized_bits_per_element": 2.0,
            "cached_tokens": 16384, "result": result,
        }  # fmt: skip

    short, long = ({"name": "recall", "lengths": [n], "keys": 1} for n in (512, 1024))
    drift = {"name": "drift", "prefix": 256}
    first, second = report.overviews(
        [
            made("full", short, {"recall": 1.0}),
            made("full", long, {"recall": 0.5}),
            made("kivi", short, {"recall": 0.25}),
            made("kivi", drift, {"kl": 0.125}),
            made("kivi", drift, {"kl": 0.25}, "b"),
        ]
    )
    assert first.title == "a, float32 on cpu, seed 0"
    assert first.header == [
        "method", "bits at 32K", "recall (lengths=[512])", "recall (lengths=[1024])",
        "drift: KL, nats",
    ]  # fmt: skip
    assert first.cells == [
        ["full", "3.00", "100.0%", "50.0%", "-"],
        ["kivi", "3.00", "25.0%", "-", "0.1250"],
    ]
    assert second.cells == [["kivi", "3.00", "0.2500"]]


def test_durations() -> None:
    for seconds, words in (
        (0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (9000, "2 h 30 min"),
    ):  # fmt: skip
        assert cli_eval.in_words(seconds) == words


def test_help_has_every_name_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "--help") == 0
    shown = capsys.readouterr().out
    words = set(re.findall(r"[\w.@:-]+", shown))
    assert {*CONTENDERS, *TASKS, *SUITES, "module:Class"} <= {word.strip(".") for word in words}
    assert "oscar-kv eval --method full" in shown
    assert run("report", "--help") == 0
    assert "oscar-kv report results.jsonl" in capsys.readouterr().out
    assert run("diagnose", "--help") == 0
    assert "oscar-kv diagnose --model" in capsys.readouterr().out


# -- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("perplexity:windows=x", "windows='x': expected a whole number"),
        ("perplexity:windows=0", "windows=0: expected at least 1"),
        ("perplexity:windows=true", "windows=True: expected a whole number"),
        ("perplexity:prefix=4096", "prefix=4096: expected at most 2046, with windows of"),
        ("perplexity:prefix=0", "prefix=0: expected at least 1"),
        ("perplexity:step=0", "step=0: expected at least 1"),
        ("perplexity:batch=0", "batch=0: expected at least 1"),
        ("perplexity:steps=1", "unknown parameters ['steps']: expected ['windows', 'length',"),
        ("perplexity:length=2", "length=2: expected at least 3"),
        ("perplexity:length", "expected parameter=value, not 'length'"),
        ("drift:bucket=0", "bucket=0: expected at least 1"),
        ("drift:prefix=2047", "prefix=2047: expected at most 2046"),
        ("attention:queries=2048", "queries=2048: expected fewer than length=2048"),
        ("recall:lengths=512", "lengths=512: expected a list as [1,2], each a whole number"),
        ("recall:lengths=[]", "lengths=(): expected at least one"),
        ("recall:lengths=[0]", "lengths=0: expected at least 1"),
        ("recall:depths=0", "depths=0: expected at least 1"),
        ("recall:definition=X {key}", "expected {key} and {value} in it"),
        ("recall:lengths=[64]", "64 of lengths: the needles alone are"),
        ("perplexity:windows=99", "99 windows of 2048 tokens: the text has 20 of 2048; expected"),
        ("speed", "task 'speed': expected one of perplexity, recall, drift, attention"),
    ],
)
def test_tasks_say_what_they_accept(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(tmp_path / "rows.jsonl", "full", task=name) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_texts_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    out = tmp_path / "rows.jsonl"
    for content, more, message in (
        ("import os\n" * 20, (), "text of shape (0, 2048): expected more than 4 rows"),
        ("import os\n" * 20, ("--row-length", 8), "the text has 4 of 8; expected windows="),
        ("", (), "text of shape (0, 2048)"),
    ):
        text.write_text(content)
        assert run("eval", "--model", MODEL, "--text", text, "--out", out, *more) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_windows_beyond_the_model(tmp_path: Path) -> None:
    small(tmp_path / "model", vocab_size=1024, max_position_embeddings=256)
    rows = tmp_path / "rows.npz"
    zeros = np.zeros((6, 512), np.int64)
    np.savez(rows, text=zeros, far=zeros + 1024, real=np.ones((6, 8)))
    task = "perplexity:windows=1,length=300,prefix=99"
    for name, message in {
        "text": "windows of 300 tokens: this model's context is 256",
        "far": "tokens from 1024 to 1024: this model has those from 0 to 1023",
        "real": "its real is float64, and token ids are integers",
        "none": "expected FILE.npz:NAME",
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "model", ["full"], [task], tokens=f"{rows}:{name}")
    with pytest.raises(ValueError, match="expected one of text and tokens"):
        evaluate(tmp_path / "model", ["full"], [task])


# -- memory ---------------------------------------------------------------------------------


def small(folder: Path, **settings: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, **settings,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def test_logits_that_do_not_fit_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows with everything kept, with nothing, and with one window of two."""
    asked: dict[str, Any] = {
        "methods": ["kivi"],
        "tasks": [TASK, "drift:windows=1,length=384,prefix=128", "attention:windows=1,length=256"],
        "tokens": HELD_OUT, "dtype": "float32",
    }  # fmt: skip
    kept = [row["result"] for row in evaluate(MODEL, **asked)]
    for limit in (0, 12_000_000):
        monkeypatch.setattr(reference.Reference.__init__, "__defaults__", (limit,))
        assert [row["result"] for row in evaluate(MODEL, **asked)] == kept


def test_few_logits_are_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 steps of the full cache and 16 of a method; those that may be kept are, all 16."""
    subject = Subject(MODEL, rows_of_array(HELD_OUT)[:5], dtype="float32", device="cpu")
    one = Perplexity(windows=1, length=640, prefix=127, step=32)
    kivi = contender("kivi", subject.model.config, tuple, lambda method: ())
    made: list[weakref.ref[Any]] = []
    most = [0]

    def count(module: Any, given: Any, logits: Any) -> None:
        made.append(weakref.ref(logits))
        most[0] = max(most[0], sum(one() is not None for one in made))

    hook = subject.model.lm_head.register_forward_hook(count)
    for limit, expected in ((0, range(5)), (1 << 30, range(17, 20))):
        monkeypatch.setattr(reference.Reference.__init__, "__defaults__", (limit,))
        most[0] = 0
        list(one.run(subject, [kivi], 0, lambda steps: None))
        assert most[0] in expected
    hook.remove()
