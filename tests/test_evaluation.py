"""Tasks, runner, report and their commands, on the bundled model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from oscar_kv.cli import main
from oscar_kv.core.attention import attention
from oscar_kv.demo import MODEL
from oscar_kv.evaluation import plots, report, runner
from oscar_kv.evaluation.cache import Contender, contender, describe
from oscar_kv.evaluation.capture import capture
from oscar_kv.evaluation.methods import method, view
from oscar_kv.evaluation.quality import score
from oscar_kv.evaluation.subject import Subject, rows_of_array, rows_of_text
from oscar_kv.evaluation.suites import SUITES
from oscar_kv.evaluation.tasks import AttentionError, Drift, Perplexity, Recall, task
from oscar_kv.evaluation.teacher import kl_divergence

HELD_OUT = f"{MODEL / 'heldout.npz'}:text"
PERPLEXITY = "perplexity:windows=2,length=512,prefix=256"
RECALL = "recall:lengths=[384],trials=1,depths=2,keys=2"


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(MODEL, rows_of_array(HELD_OUT)[:8, :700], dtype="float32", device="cpu")


def contenders(subject: Subject, *names: str) -> list[Contender]:
    config = subject.model.config
    return [
        contender(name, config, lambda: subject.calibration, subject.sensitivity) for name in names
    ]


def ignore(steps: int) -> None:
    """No progress display."""


# -- tasks ----------------------------------------------------------------------------------


def test_perplexity_is_that_of_a_single_pass(subject: Subject) -> None:
    one = Perplexity(windows=2, length=400, prefix=256)
    names = ("full", "compact@cache", "kivi")
    full, real, kivi = (m.result for m in one.run(subject, contenders(subject, *names), 0, ignore))
    windows = subject.windows(2, 400)
    with torch.no_grad():
        logits = subject.model(windows, use_cache=False).logits[:, 256:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 257:].flatten())
    assert full["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert full["kl"] == 0
    assert full["agreement"] == 1
    assert abs(full["increase_percent"]) < 1e-4
    assert full["tokens"] == 2 * 143
    scored = score(subject.model, windows, ["compact"], prefix=256)["compact"]
    assert real["loss"] == pytest.approx(scored.loss, rel=1e-5)
    assert kivi["kl"] > 0.005
    assert kivi["full_perplexity"] == pytest.approx(full["perplexity"])
    assert kivi["increase_percent"] == pytest.approx(
        100 * (kivi["perplexity"] / full["perplexity"] - 1)
    )
    differences = torch.tensor(kivi["loss_by_window"]) - torch.tensor(full["loss_by_window"])
    spread = 100 * kivi["perplexity"] / full["perplexity"] * float(differences.std()) / 2**0.5
    assert kivi["increase_error"] == pytest.approx(spread, rel=1e-2)


def test_kl_divergence_in_numbers() -> None:
    one = torch.tensor([0.5, 0.25, 0.25]).log() + 7
    other = torch.tensor([0.25, 0.25, 0.5]).log() - 2
    assert float(kl_divergence(one, other)) == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert float(kl_divergence(one, one)) == 0


def test_drift_is_the_divergence_by_position(subject: Subject) -> None:
    one = Drift(windows=1, length=520, prefix=128, bucket=128)
    full, kivi = (
        m.result for m in one.run(subject, contenders(subject, "full", "kivi"), 0, ignore)
    )
    assert full == {"kl": 0, "kl_by_position": [0, 0, 0, 0]}
    whole = Perplexity(windows=1, length=520, prefix=128)
    same = next(whole.run(subject, contenders(subject, "kivi"), 0, ignore)).result
    assert kivi["kl"] == pytest.approx(same["kl"], rel=1e-4)
    sizes = torch.tensor([128.0, 128, 128, 7])
    mean = (torch.tensor(kivi["kl_by_position"]) * sizes).sum() / sizes.sum()
    assert float(mean) == pytest.approx(kivi["kl"], rel=1e-4)


def test_attention_error_is_that_of_exact_states(subject: Subject) -> None:
    one = AttentionError(windows=1, length=512)
    full, kivi = one.run(subject, contenders(subject, "full", "kivi"), 0, ignore)
    assert full.result["error"] < 1e-6
    states = list(capture(subject.model, subject.windows(1, 512)).values())
    errors = []
    for layer in states:
        # 448 tokens: the middle of the last 128
        seen = view(method("kivi"), layer.keys[:, :, :448], layer.values[:, :, :448])
        keys = torch.cat([seen.keys, layer.keys[:, :, 448:]], 2)
        values = torch.cat([seen.values, layer.values[:, :, 448:]], 2)
        query = layer.queries[:, :, -128:]
        exact = attention(query, layer.keys, layer.values)
        errors.append(float((attention(query, keys, values) - exact).norm() / exact.norm()))
    assert kivi.result["error_by_layer"] == pytest.approx(errors, rel=1e-3)
    assert kivi.bits.all == pytest.approx(3 * 384 / 448 + 16 * 64 / 448)
    assert kivi.bits.quantized == 3


@pytest.mark.parametrize("keys", [1, 4])
@pytest.mark.parametrize("values", [1, 2])
def test_needles_are_where_they_should_be(subject: Subject, keys: int, values: int) -> None:
    one = Recall(lengths=(384, 640), keys=keys, values=values, depths=4, trials=2)
    texts = one.texts(subject, seed=5)
    assert len(texts) == one.count == (16 if keys == 1 else 4)
    decode = subject.tokenizer.decode
    for row, text in texts:
        context = decode(text.tokens[0, : text.context])
        questions = decode(text.tokens[0, text.context :])
        assert text.context == one.lengths[row]
        assert questions.count("assert REF_") == keys == len(text.answers)
        for depth, answer in zip(text.depths, text.answers):
            value = decode(text.tokens[0, answer]).strip()
            assert len(value.split()) == values
            asked = questions.index(f"== {value}")
            name = questions[:asked].split()[-1]
            assert context.count(f"\n{name} = {value}") == 1
            place = context.index(f"{name} = ") / len(context)
            assert abs(place - (depth + 0.5) / 4) < 0.2
    assert sorted({depth for _, text in texts for depth in text.depths}) == [0, 1, 2, 3]
    again, other = one.texts(subject, seed=5), one.texts(subject, seed=6)
    assert all(torch.equal(a.tokens, b.tokens) for (_, a), (_, b) in zip(texts, again))
    assert not all(torch.equal(a.tokens, b.tokens) for (_, a), (_, b) in zip(texts, other))


def test_recall_counts_whole_answers(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model recalls; nothing is recalled that was never said."""
    one = Recall(lengths=(512,), keys=4, depths=4, trials=1)
    names = contenders(subject, "full", "compact")
    for found in one.run(subject, names, 0, ignore):
        assert found.result == {"recall": 1, "answers": 4, "map": [[1, 1, 1, 1]]}
    texts = one.texts(subject, 0)
    for _, text in texts:
        for answer in text.answers[:2]:
            text.tokens[0, answer[-1]] = 0
    monkeypatch.setattr(Recall, "texts", lambda self, subject, seed: texts)
    for found in one.run(subject, names, 0, ignore):
        assert found.result["recall"] == 0.5
        wrong = {texts[0][1].depths[i] for i in (0, 1)}
        assert {d for d, share in enumerate(found.result["map"][0]) if share == 0} == wrong


def test_all_contenders_get_the_same_windows(subject: Subject) -> None:
    """What a task makes does not depend on who is measured: alone or among others, same result."""
    for one in (
        Perplexity(windows=1, length=300, prefix=128),
        Recall(lengths=(256,), keys=2, depths=2, trials=1),
        Drift(windows=1, length=300, prefix=128),
        AttentionError(windows=1, length=256),
    ):
        (alone,) = one.run(subject, contenders(subject, "quarot"), 0, ignore)
        among = one.run(subject, contenders(subject, "kivi", "compact@cache", "quarot"), 0, ignore)
        assert list(among)[2] == alone
        steps: list[int] = []
        list(one.run(subject, contenders(subject, "kivi", "fp8"), 0, steps.append))
        assert sum(steps) == 2 * one.count


def test_text_is_never_what_was_used_for_calibration(subject: Subject) -> None:
    rows = rows_of_array(HELD_OUT)[:8, :700]
    assert torch.equal(subject.rows, rows[:4])
    assert torch.equal(subject.windows(4, 100), rows[:4, :100])
    assert torch.equal(subject.windows(2, 100), rows[[0, 3], :100])
    assert len(subject.calibration) == 8
    assert subject.calibration[0].keys.shape == (4, 2, 700, 128)


def test_rows_begin_as_the_tokenizer_begins_a_text(subject: Subject, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("import os\nprint(os.name)\n" * 50)
    rows = rows_of_text(file, subject.tokenizer, 32)
    first, *ids = subject.tokenizer(file.read_text()).input_ids
    assert rows.shape == (len(ids) // 31, 32)
    assert rows[:, 0].tolist() == [first] * len(rows)
    assert rows[:, 1:].flatten().tolist() == ids[: 31 * len(rows)]
    assert rows_of_text(file, subject.tokenizer, 10_000).shape == (0, 10_000)
    with pytest.raises(ValueError, match="rows of 1 tokens: expected more than the 1 in front"):
        rows_of_text(file, subject.tokenizer, 1)


@pytest.mark.parametrize("template", [None, "$A <end>", "<a> <b> $A", "<a> $A <end>"])
def test_rows_of_tokenizers_that_begin_otherwise(template: str | None, tmp_path: Path) -> None:
    """Without a special token, with two, and with one behind a text, which no row ends with."""
    special = {"<a>": 0, "<b>": 1, "<end>": 2}
    words = {f"w{i}": i + 3 for i in range(20)}
    backend = Tokenizer(models.WordLevel({**special, **words}, unk_token="<a>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(special.items())
        )
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words))
    rows = rows_of_text(file, PreTrainedTokenizerFast(tokenizer_object=backend), 6)
    begin = [special[one] for one in (template or "$A").split("$A")[0].split()]
    each = 6 - len(begin)
    assert rows.tolist() == [
        begin + list(range(3 + i * each, 3 + (i + 1) * each)) for i in range(20 // each)
    ]


# -- runner and commands --------------------------------------------------------------------


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def evaluate(out: Path, *names: str, tasks: tuple[str, ...] = (PERPLEXITY, RECALL)) -> int:
    options = [part for name in names for part in ("--method", name)]
    options += [part for one in tasks for part in ("--task", one)]
    return run("eval", "--out", out, "--dtype", "float32", *options)


def test_rows_are_complete_and_a_second_run_only_adds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "some" / "rows.jsonl"
    assert evaluate(out, "full", "compact") == 0
    first = out.read_text()
    assert "4 results written, 0 were there" in capsys.readouterr().err
    rows = runner.read_rows(out)
    assert [(r["task"]["name"], r["method"]["name"]) for r in rows] == [
        ("perplexity", "full"), ("perplexity", "compact"),
        ("recall", "full"), ("recall", "compact"),
    ]  # fmt: skip
    row = rows[1]
    assert row["method"]["config"]["key_group"] == 128
    assert row["task"] == {"name": "perplexity", **dataclasses.asdict(task(PERPLEXITY))}  # pyright: ignore
    assert row["seed"] == 0
    assert row["model"]["name"] == "demo"
    assert len(row["model"]["weights"]) == 16
    assert row["environment"]["versions"]["torch"] == torch.__version__
    assert {"commit", "cpu", "gpu", "python"} <= row["environment"].keys()
    assert row["quantized_bits_per_element"] == pytest.approx(2.21875)

    # killed while it wrote a row: what is whole stays, what was cut is run again
    out.write_text(first + '{"key": "half a')
    assert evaluate(out, "full", "kivi", "compact") == 0
    assert "2 results written, 4 were there" in capsys.readouterr().err
    assert out.read_text().startswith(first)
    assert [r["method"]["name"] for r in runner.read_rows(out)[4:]] == ["kivi", "kivi"]
    assert evaluate(out, "full", "kivi", "compact") == 0
    assert "0 results written, 6 were there" in capsys.readouterr().err
    # another seed or setting is another result
    assert run("eval", "--out", out, "--dtype", "float32", "--method", "full", "--task", RECALL,
               "--seed", 1) == 0  # fmt: skip
    assert len(runner.read_rows(out)) == 7


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "tiny.jsonl"
    tasks = (
        PERPLEXITY,
        RECALL,
        "drift:windows=1,length=512,prefix=256",
        "attention:windows=1,length=512",
    )
    assert evaluate(out, "full", "kivi", "compact", "compact@cache", tasks=tasks) == 0
    return out


def test_report(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- results: tiny -->\nold\n<!-- end -->\n\nafter\n")
    folder = tmp_path / "report"
    assert run("report", results, "--out", folder, "--into", page) == 0
    shown = capsys.readouterr().out.splitlines()
    listed = [line for line in shown if line.startswith(str(folder))]
    assert all(Path(path).stat().st_size > 500 for path in listed)
    kinds = {Path(path).stem.split("_")[-1] for path in listed}
    assert kinds == {"pareto", "map", "positions", "report"}

    rows = runner.read_rows(results)
    markdown = (folder / "report.md").read_text()
    text = page.read_text()
    assert text.startswith("# Page")
    assert text.endswith("<!-- end -->\n\nafter\n")
    assert "old" not in text
    for row in rows:
        assert f"| {report.label(row)} | {row['bits_per_element']:.2f} |" in markdown
    perplexity = next(r for r in rows if r["method"]["name"] == "kivi")["result"]["perplexity"]
    assert f"{perplexity:.3f}" in text
    assert rows[0]["environment"]["commit"] in text
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == len([path for path in listed if path.endswith(".svg")]) == 6
    assert f"{perplexity:.3f}" in html
    assert "http-equiv" not in html
    assert "src=" not in html
    # filling a page again changes nothing
    report.fill_page(page, [report.Section.read(results)])
    assert page.read_text() == text


def _row(name: str, bits: float, kl: float) -> runner.Row:
    return {"method": {"name": name}, "bits_per_element": bits, "result": {"kl": kl}}


def test_the_page_shows_what_the_result_files_hold() -> None:
    root = Path(__file__).parents[1]
    files = sorted((root / "benchmarks" / "results" / "evaluation").glob("*.jsonl"))
    assert files
    page = (root / "docs" / "evaluation.md").read_text()
    assert page.count("<!-- results: ") == len(files)
    for file in files:
        section = report.Section.read(file)
        assert f"<!-- results: {section.title} -->\n\n{section.markdown()}\n<!-- end -->" in page


def test_the_front_in_numbers() -> None:
    rows = [_row("a", 2, 0.3), _row("b", 3, 0.1), _row("c", 3, 0.2), _row("d", 4, 0.1)]
    table = report.Table({}, {"name": "perplexity"}, rows)
    assert table.front() == {"a", "b"}


def test_ours_are_red() -> None:
    names = ["kivi", "mixed:base=kivi", "compact", "compact@cache", "ablation", "mixed"]
    rows = [{**_row(name, 2, 0.1), "method": {"name": name, **describe(name)}} for name in names]
    figure = plots.pareto(report.Table({"name": "tiny"}, {"name": "perplexity"}, rows))
    collections: list[Any] = list(figure.axes[0].collections)
    colours = [to_hex(points.get_facecolor()[0]) for points in collections]
    blue, red = to_hex("tab:blue"), to_hex("tab:red")
    assert colours == [blue, blue, red, red, red, red]


def test_bits_of_a_longer_context() -> None:
    """2,000 of 4,000 tokens at 2 bits, the rest at 16: 9 on average, and 3.7 at 32K."""
    row = {"bits_per_element": 9, "quantized_bits_per_element": 2, "cached_tokens": 4000}
    expected = (2 * (32768 - 2000) + 16 * 2000) / 32768
    assert report.bits_at(row, 32768) == pytest.approx(expected)


def test_labels_leave_out_what_a_suite_shares() -> None:
    labels = [report.label({"method": {"name": name}}) for name in SUITES["ablation"]]
    assert labels[1] == "compact"
    assert labels[3] == "paper's grid,token_scale=none"
    assert len(set(labels)) == len(labels)
    same = [report.label({"method": {"name": name}}) for name in SUITES["same-window"]]
    assert "kivi" in same
    for suite in SUITES.values():
        for name in suite:
            describe(name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "--suite", "all"], "suite 'all': expected one of"),
        (["eval", "--method", "kiwi"], "method 'kiwi': expected one of"),
        (["eval", "--task", "speed"], "task 'speed': expected one of"),
        (["eval", "--task", "drift:window=3"], r"unknown parameters \['window'\]"),
        (["eval", "--task", "recall:keys=3"], "keys=3: expected 1 or a multiple"),
        (["eval", "--task", "perplexity:length=9999"], "8 windows of 9999 tokens: the text has"),
        (["eval", "--model", "m"], "expected --model and one of --tokens and --text"),
        (["eval", "--model", MODEL, "--tokens", "no.npz:text"], "'no.npz:text': expected FILE"),
        (["eval", "--model", MODEL, "--text", "no.txt"], "cannot read 'no.txt'"),
        (["report", "no.jsonl"], "'no.jsonl': no results"),
    ],
)
def test_mistakes_are_one_line(
    args: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(captured.err)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_result_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.jsonl"
    for content in ('{"a": 1}\n', "[]\n", "hello\n"):
        file.write_text(content)
        assert evaluate(file, "full") == 2
        assert "line 1: not a result row" in capsys.readouterr().err
        assert file.read_text() == content
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="expected <!-- results: x -->"):
        report.fill_page(page, [report.Section("x", [])])
    assert page.read_text() == "nothing here"


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match=r"text of shape \(4, 2048\): expected more than 4 rows"):
        Subject(MODEL, rows_of_array(HELD_OUT)[:4])
