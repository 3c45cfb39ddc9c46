"""Methods that are not of this package: by name, from Python, and what is said of wrong ones."""

from __future__ import annotations

import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, blocks
from transformers import AutoConfig

from oscar_kv.cli import main
from oscar_kv.demo import MODEL
from oscar_kv.evaluation import evaluate, runner
from oscar_kv.evaluation.cache import describe, name_of
from oscar_kv.evaluation.fit import require_fit
from oscar_kv.evaluation.methods import KIVI, method

PAGE = ROOT / "docs" / "evaluation.md"
TASK = "attention:windows=1,length=384"
HEADER = """
from dataclasses import dataclass
from oscar_kv.evaluation.methods import Method, Quantized
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current one, where modules are found; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("nowhere", *(file.stem for file in tmp_path.glob("*.py"))):
        sys.modules.pop(name, None)


def write(folder: Path, body: str, module: str = "mine") -> None:
    (folder / f"{module}.py").write_text(HEADER + body)
    sys.modules.pop(module, None)


def example() -> str:
    """The class of the page."""
    return next(code for code in blocks(PAGE, "python") if "class Rounded" in code)


def test_the_example_of_the_page_runs_as_its_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.py").write_text(example())
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(folder)])
    text = PAGE.read_text()
    script = text[text.index("<!-- needs mine.py -->") :].split("```sh\n")[1].split("```")[0]
    program, *arguments = shlex.split(script.replace("\\\n", " "))
    assert program == "oscar-kv"
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--dtype", "float32"])
    assert not stop.value.code
    full, mine = runner.read_rows(folder / "mine.jsonl")
    assert mine["method"]["name"] == "mine:Rounded:bits=3"
    assert mine["method"]["class"] == "mine:Rounded"
    assert mine["method"]["bits"] == 3
    # 256 quantized tokens of the last step's middle, 3 bits and a float16 scale per 128 channels
    assert mine["quantized_bits_per_element"] == pytest.approx(3 + 16 / 128)
    assert mine["result"]["kl"] > full["result"]["kl"] == 0
    assert "mine:Rounded:bits=3" in capsys.readouterr().out


def test_a_change_of_its_code_is_another_result(folder: Path) -> None:
    write(folder, example())
    asked: dict[str, Any] = {
        "methods": ["mine:Rounded"], "tasks": [TASK], "tokens": f"{MODEL}/heldout.npz:text",
        "out": folder / "rows.jsonl", "dtype": "float32",
    }  # fmt: skip
    (first,) = evaluate(MODEL, **asked)
    assert evaluate(MODEL, **asked) == [first]
    write(folder, example().replace("(x / scale).round()", "(x / scale).floor()"))
    (other,) = evaluate(MODEL, **asked)
    assert other["result"]["error"] > first["result"]["error"] > 0
    assert other["method"] == {**first["method"], "code": other["method"]["code"]}
    assert runner.read_rows(folder / "rows.jsonl") == [first, other]


def test_a_class_without_a_file(folder: Path) -> None:
    """Typed into an interpreter, it is taken from Python."""
    sys.modules["nowhere"] = module = types.ModuleType("nowhere")
    exec(example(), module.__dict__)
    mine = module.Rounded(bits=8)
    (row,) = evaluate(MODEL, [mine], [TASK], tokens=f"{MODEL}/heldout.npz:text", dtype="float32")
    assert row["method"]["name"] == "Rounded:bits=8"
    assert row["method"]["class"] == "nowhere:Rounded"
    assert row["method"]["code"] is None
    assert 0 < row["result"]["error"] < 0.01


def test_names_with_modules(folder: Path) -> None:
    write(folder, example(), "package_like")
    found: Any = method("package_like:Rounded:bits=2,recent_tokens=0")
    assert (type(found).__name__, found.bits, found.recent_tokens) == ("Rounded", 2, 0)
    assert method("package_like:Rounded").block_tokens == 1
    assert describe("package_like:Rounded")["class"] == "package_like:Rounded"
    assert "code" not in describe("kivi")
    assert name_of(KIVI(group=64, recent_tokens=128)) == "KIVI:recent_tokens=128,group=64"
    assert name_of(KIVI()) == "KIVI"
    mixed = describe("mixed:base=package_like:Rounded,layers=1")
    assert mixed["base"]["bits"] == 4


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ("", "mine:Nobody", "'mine' has no class Nobody that is derived from"),
        ("class Other: pass", "mine:Other", "'mine' has no class Other that is derived from"),
        ("", "nothing_there:Any", r"cannot import 'nothing_there' \(ModuleNotFoundError: No mod"),
        ("1 / 0", "mine:Any", r"cannot import 'mine' \(ZeroDivisionError: division by zero\)"),
        ("def f(:", "mine:Any", r"cannot import 'mine' \(SyntaxError"),
        ("class Mine(Method): pass", "mine:Mine", "abstract"),
        ("@dataclass\nclass Mine(Method): pass", "mine:Mine", "non-frozen"),
    ],
)
def test_what_is_no_method(folder: Path, body: str, name: str, message: str) -> None:
    write(folder, body)
    with pytest.raises(ValueError, match=message) as caught:
        method(name)
    assert str(caught.value).startswith(f"method {name!r}: ")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("keys, values", "not enough values to unpack"),
        ("Quantized(keys[..., 1:], values, 1)", r"reads keys as \(1, 2, 1, 127\); expected finite"),
        ("Quantized(keys, values / 0, 1)", "reads values as"),
        ("Quantized(keys, values, 0)", "bits=0; expected every bit"),
        ("1 / 0", "cannot quantize 2 KV heads of 128 channels: division by zero"),
    ],
)
def test_what_a_method_returns_is_tried_first(folder: Path, returned: str, message: str) -> None:
    body = f"def quantize(self, keys, values, start):\n        return {returned}"
    write(folder, f"class Mine(Method):\n    {body}")
    with pytest.raises(ValueError, match=message):
        require_fit("mine:Mine", AutoConfig.from_pretrained(MODEL))


def test_values_are_of_their_types(folder: Path) -> None:
    write(folder, example())
    for name, message in {
        "mine:Rounded:bits=x": "bits='x': expected a whole number",
        "mine:Rounded:levels=4": r"unknown parameters \['levels'\]: expected \['sink_tokens'",
        "mine:Rounded:recent_tokens=-1": "recent_tokens=-1: expected at least 0",
        "kivi:group=x": "method 'kivi:group=x': group='x': expected a whole number",
        "kivi:group": "expected parameter=value, not 'group'",
        "kivi:block_tokens=0": "block_tokens=0: expected at least 1",
        "turboquant-2:bits=true": "bits=True: expected a number",
        "turboquant-2:bits=NaN": "bits=nan: expected a number",
        "ablation:rotation=1": "rotation=1: expected true or false",
        "ablation:value_group=x": "value_group='x': expected a whole number or null",
        "fp8:scale=page": "scale='page': expected one of",
        "compact:recent_tokens=x": "recent_tokens='x'",
        "full:bits=2": "full takes no parameters",
        "kiwi": "expected one of full, fp8, .*, mixed, or module:Class",
    }.items():
        with pytest.raises(ValueError, match=message):
            describe(name)


def test_zero_groups_and_bits(folder: Path) -> None:
    config = AutoConfig.from_pretrained(MODEL)
    for name in ("kivi:group=0", "kivi:bits=0", "quarot:bits=-1"):
        with pytest.raises(ValueError, match="expected at least 1"):
            require_fit(name, config)


def test_calibrated_methods_are_not_tried() -> None:
    require_fit("oscar-eigen", AutoConfig.from_pretrained(MODEL))
