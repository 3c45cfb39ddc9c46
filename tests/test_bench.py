"""The GPU benchmarks, as far as they run without one: refusals, rows, files, pictures."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import record
from benchmarks.gpu import (
    baselines,
    kernel,
    model,
    oracle,
    plots,
    prefill,
    sides,
    splitk,
    states,
    timing,
)
from benchmarks.gpu.report import Report
from oscar_kv import cli, quantize
from oscar_kv.core.attention import attention

triton = pytest.importorskip("triton")
INTERPRETED = bool(triton.knobs.runtime.interpret)
needs_kernels = pytest.mark.skipif(
    not INTERPRETED or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
CPU = torch.device("cpu")
CEILING = {"copy_tb_s": 4.0, "read_tb_s": 4.5}


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "copies_for", lambda nbytes: 2)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Result files go here."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


# -- the command ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "Missing argument"),
        (["bench", "nothing"], "expected one of ('kernel', 'prefill', 'model')"),
        (["bench", "kernel", "--fast"], "No such option"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "kernel"])
    assert stop.value.code == 2
    assert "CUDA GPU" in capsys.readouterr().err


def test_without_a_checkout_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "oscar_kv" / "cli.py"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "model"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "in a checkout of the repository, run python -m oscar_kv bench model" in error


def test_it_runs_the_benchmark_in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    class Done:
        returncode = 3

    def run(command: list[str], cwd: Path, check: bool) -> Done:
        ran.append((command[1:], (cwd / "benchmarks" / "gpu").is_dir()))
        return Done()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli.subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "prefill", "--quick", "--json"])
    assert ran == [(["-m", "benchmarks.gpu.prefill", "--quick", "--json"], True)]
    assert stop.value.code == 3


def test_a_part_of_the_model_benchmark() -> None:
    assert model.chosen(quick=False, only="throughput 4K") == {
        "throughput 4K": ("throughput", 4096)
    }
    cases = ["latency 1K", "latency 32K", "latency 128K", "throughput 32K"]
    assert list(model.chosen(quick=True, only="")) == cases
    with pytest.raises(typer.BadParameter, match=re.escape(f"expected one of {cases}")):
        model.chosen(quick=True, only="throughput 4K")


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, math.nan, math.inf, 2 * oracle.TOLERANCE])
def test_no_speed_up_without_proof(error: float | None) -> None:
    assert oracle.speed_up(10.0, 5.0, 0.0, oracle.TOLERANCE) == 2.0
    assert oracle.speed_up(10.0, 5.0, 0.0, error) is None
    assert oracle.speed_up(10.0, 5.0, error, 0.0) is None


def test_nan_is_the_worst_error() -> None:
    assert math.isnan(oracle.worst([0.1, math.nan, 0.2]))
    assert oracle.worst([0.1, 0.3, 0.2]) == 0.3


def test_no_speed_up_without_a_baseline_or_checks() -> None:
    assert oracle.speed_up(None, 5.0, 0.0) is None
    assert oracle.speed_up(10.0, 5.0) is None


def test_the_oracle_sees_a_wrong_sequence_a_wrong_head_and_nan() -> None:
    query = torch.randn(3, 8, 1, 64)
    keys, values = torch.randn(2, 3, 2, 300, 64)
    packed = quantize(keys, values)
    exact = attention(query.double(), *packed.dense(torch.float64))
    assert oracle.packed_error(exact, query, packed) < 1e-12
    for spoil in (torch.nan, 1.0):
        wrong = exact.clone()
        wrong[2, 7] = spoil
        assert not oracle.packed_error(wrong, query, packed) <= oracle.TOLERANCE
    assert not oracle.dense_error(exact, query, keys, values) <= oracle.TOLERANCE


def test_a_wrong_or_failing_baseline_is_not_compared_with() -> None:
    query, found = torch.randn(1, 4, 1, 64), baselines.Found()
    copies = [(torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64))]

    def fails(query: Any, states: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    def right(query: Any, states: Any) -> Any:
        return lambda: attention(query, *states)

    def wrong(query: Any, states: Any) -> Any:
        return lambda: torch.zeros_like(query)

    for build in (fails, wrong, right):
        found.add(
            build.__name__, build, query, copies,
            lambda out: oracle.dense_error(out, query, *copies[0]),
        )  # fmt: skip
    assert found.best == "right"
    assert found.refused == {"fails": "no kernel", "wrong": "off by 1.0e+00"}


# -- kernels --------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "lengths"),
    [(8, 2, 64, [300, 1]), (32, 4, 128, [130]), (6, 3, 64, [65, 200, 128]), (2, 2, 64, [64])],
)
def test_split_k_agrees_with_the_oracle(
    heads: int, kv_heads: int, dim: int, lengths: list[int]
) -> None:
    batch, capacity = len(lengths), max(lengths) + 20
    query = torch.randn(batch, heads, 1, dim).half()
    keys, values = torch.randn(2, batch, kv_heads, capacity, dim).half()
    for row, length in enumerate(lengths):
        keys[row, :, length:] = values[row, :, length:] = torch.nan  # must not be read
    for launch in splitk.launches(batch, kv_heads, max(lengths), multiprocessors=16):
        run = splitk.SplitK(batch, heads, kv_heads, dim, launch, CPU)
        on_device = torch.tensor(lengths, dtype=torch.int32)
        run(query, keys, values, on_device)
        out = run(query, keys, values, on_device)  # what counts arrivals is ready again
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            states_of_row = keys[one, :, :length], values[one, :, :length]
            assert oracle.dense_error(out[one], query[one], *states_of_row) < 2e-3


# -- rows -----------------------------------------------------------------------------------


@needs_kernels
def test_kernel_rows() -> None:
    variants = [kernel.COMPACT, kernel.NO_WINDOW, kernel.RAGGED, kernel.PADDED, kernel.MODEL]
    shape = kernel.Shape(2, 384, 8, 2, 64)
    rows = [r for v in variants for r in kernel.measure(shape, v, CEILING, torch.float16)]
    assert [row["kind"] for row in rows] == ["uniform", "uniform", "ragged", "padded", "model"]
    assert [row["recent_tokens"] for row in rows] == [128, 0, 128, 128, 128]
    for row in rows:
        assert row["oracle_error"] < oracle.TOLERANCE
        assert row["speed_up"] == pytest.approx(row["best_bf16_us"] / row["us_p50"])
        assert row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["tb_s"] == pytest.approx(row["bytes"] / row["us_p50"] / 1e6)
    assert any("split-K" in name for name in rows[0]["bf16_us"])
    assert rows[2]["us_uniform_lengths"] > 0


def test_prefill_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64}.items():
        monkeypatch.setattr(prefill, name, value)
    (pack,) = prefill.pack_rows("compact", 512, CEILING, {"gemm_us": 1.0, "attention_us": 1.0})
    assert pack["restored_error"] == pytest.approx(pack["restored_error_reference"], rel=1e-3)
    assert pack["share_of_layer"] > 0
    (extend,) = prefill.extend_rows("compact", 40, 256, CEILING)
    assert extend["oracle_error"] < oracle.TOLERANCE
    assert extend["speed_up"] > 0


def test_every_shape_with_a_target_is_planned() -> None:
    for quick in (False, True):
        planned = kernel.plan(quick)
        assert len({str(shape) for shape in planned}) == len(planned)
    targets = {shape.target for shape, _ in kernel.plan(quick=False)} - {None}
    assert targets == set(kernel.TARGETS.values())


def test_copies_exceed_the_l2_cache() -> None:
    assert timing.copies_for(1 << 40) == 1
    nbytes = 1 << 20
    assert timing.copies_for(nbytes) * nbytes >= 2 * (50 << 20)


def test_bytes_read_leave_out_what_is_not_in_use() -> None:
    keys, values = torch.randn(2, 1, 2, 300, 64)
    packed = quantize(keys, values, states.config_of("compact"))
    layout, tail = packed.layout, 300 - 128
    pages = 2 * layout.page_bytes
    assert states.bytes_read(packed) == pages + tail * 2 * 2 * 64 * 4


# -- files and pictures ---------------------------------------------------------------------


def test_results_grow_row_by_row_and_survive_a_failure(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"case": (-8, lambda row: row["case"]), "us": (8, lambda row: row["us_p50"])}
    report = Report("bench", {"dtype": "bfloat16"}, columns, as_json=True)
    report.add({"case": "one", "us_p50": 1.5, "bf16_us": {"flash": 2.0}})

    def fails() -> Any:
        yield {"case": "two", "us_p50": 2.5}
        raise RuntimeError("out of luck\nor memory")

    report.attempt("three", fails)
    report.close(["four"])
    written = json.loads((results / "bench.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert written["settings"] == {"dtype": "bfloat16", "skipped": ["four"]}
    assert [row["case"] for row in written["rows"]] == ["one", "two", "three"]
    assert written["rows"][2]["failed"] == "RuntimeError: out of luck"
    with (results / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["bf16_us.flash"] == "2.0"
    assert rows[0]["commit"] == written["environment"]["commit"]


def test_a_budget_begins_nothing_too_late() -> None:
    budget = timing.Budget(seconds=1e9)
    begun = []
    for name, _ in budget.within({"a": 1, "b": 2, "c": 3}):
        begun.append(name)
        budget.seconds = -1.0
    assert begun == ["a"]
    assert budget.skipped == ["b", "c"]


def _kernel_row(batch: int, context: int, **more: Any) -> dict[str, Any]:
    row = {
        "case": f"{batch}x{context}", "batch": batch, "context": context, "heads": 32,
        "kv_heads": 8, "head_dim": 128, "preset": "compact", "recent_tokens": 128,
        "kind": "uniform", "bytes": context * 560, "tb_s": 2.0, "us_p50": 10.0, "speed_up": 3.0,
    }  # fmt: skip
    return {**row, **more}


def _model_row(case: str, context: int, **more: Any) -> dict[str, Any]:
    side = {"batch": 4, "ms_p50": 5.0, "roofline_ms": 4.0, "tokens_per_s": 800.0}
    row = {"case": case, "context": context, "bf16": side, "ours": side, "speed_up": 1.0}
    return {**row, **more}


def test_pictures(results: Path) -> None:
    rows = [
        *(_kernel_row(batch, context) for batch in (1, 8) for context in (1024, 32768)),
        _kernel_row(1, 32768, preset="paper", recent_tokens=0),
        _kernel_row(1, 4096, speed_up=None),
        {"case": "8x128K", "failed": "RuntimeError: no"},
    ]
    record.write("gpu_kernel", {**CEILING}, rows)
    assert [path.name for path in plots.draw(results, results)] == [
        "gpu_speed_up.svg",
        "gpu_roofline.svg",
    ]
    rows = [
        *(_model_row(f"latency {context}K", context * 1024) for context in (1, 32)),
        _model_row("throughput 4K, batch 4", 4096),
        _model_row("throughput 4K, largest", 4096),
        _model_row("latency 128K", 131072, speed_up=None),
    ]
    record.write("gpu_model", {"preset": "compact"}, rows)
    drawn = plots.draw(results, results / "pictures")
    assert len(drawn) == 3
    assert all(path.stat().st_size > 1000 for path in drawn)


# -- the model ------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> Iterator[Any]:
    """A Llama of two layers, compiled as in the benchmark, except that nothing is generated."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from oscar_kv.integrations.compile import compile_layers

    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    torch.compiler.reset()
    compile_layers(model, backend="eager")
    yield model
    torch.compiler.reset()


@needs_kernels
@torch.no_grad()
def test_the_static_cache_decodes_as_transformers_does(tiny: Any) -> None:
    side = sides.Bf16(tiny)
    cache = side.filled(2, 192, 200)
    exact = side.exact(side.filled(2, 192, 200))
    ids = torch.arange(6).view(3, 2, 1)
    tiny.set_attn_implementation("sdpa")
    with torch.compiler.set_stance("force_eager"):
        expected = [tiny(step, past_key_values=exact).logits for step in ids]
    side.serve(cache)
    found = [tiny(step, past_key_values=cache).logits for step in ids]
    for a, b in zip(found, expected):
        assert oracle.relative_error(a, b) < 5e-3
    assert cache.get_seq_length() == 195
    assert cache.lengths.tolist() == [195, 195]
    assert side.attention_error(cache) < 2e-3
    assert side.bytes_read(cache) == 195 * 2 * 2 * 2 * 2 * 64 * 2


@needs_kernels
@torch.no_grad()
def test_rows_of_the_model_share_what_is_compiled(tiny: Any) -> None:
    """Else compiling would take the benchmark's time or, beyond Dynamo's limit, not happen."""

    def step(batch: int, context: int) -> None:
        for side in (sides.Bf16(tiny), sides.Oscar(tiny, "compact")):
            cache = side.filled(batch, context, context + 8)
            side.serve(cache)
            tiny(torch.ones(batch, 1, dtype=torch.long), past_key_values=cache)

    for batch in (2, 1, 3):
        step(batch, 40)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(1, 140)
        step(4, 40)
