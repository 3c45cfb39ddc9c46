"""A diagnosis of the demo model: its numbers, what it recommends, its findings and its report."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from oscar_kv import OscarConfig
from oscar_kv.demo import MODEL
from oscar_kv.evaluation.diagnose import Diagnosis, StepErrors, diagnose
from oscar_kv.evaluation.diagnose_presets import PresetResult, Recommendation, recommend
from oscar_kv.evaluation.diagnose_report import findings, head_table, write
from oscar_kv.evaluation.quality import score
from oscar_kv.generation import load


@pytest.fixture(scope="module")
def demo() -> Diagnosis:
    loaded = load(MODEL, "float32", "cpu")
    ids = loaded.encode((MODEL / "prompt.txt").read_text())
    return diagnose(loaded.model, {"input_ids": ids[:, :600]}, ids[:, 600:632], name="<demo>")


def test_divergence_is_that_of_the_public_cache(demo: Diagnosis) -> None:
    model = load(MODEL, "float32", "cpu").model
    ids = load(MODEL, "float32", "cpu").encode((MODEL / "prompt.txt").read_text())[:, :632]
    # 600 tokens of prompt give the first prediction, the 31 steps after it read packed pages
    scored = score(model, ids, ["compact"], prefix=600, step=1)["compact"]
    found = next(one for one in demo.presets if one.name == "compact")
    assert found.tokens == 32
    assert found.agreement == pytest.approx((1 + 31 * scored.agreement) / 32)
    assert 0 < found.kl < 0.1
    assert demo.recommendation == recommend(demo.presets)
    assert [one.bits for one in demo.presets] == sorted(one.bits for one in demo.presets)


def test_steps_are_means_over_layers(demo: Diagnosis) -> None:
    assert len(demo.layers) == 8
    for number, step in enumerate(demo.steps):
        both = [layer.steps[number].both for layer in demo.layers]
        assert step.both == pytest.approx(sum(both) / 8)
    assert demo.steps[0].both > demo.steps[-1].both
    compact = next(one for one in demo.presets if one.name == "compact")
    assert compact.attention == pytest.approx(demo.steps[-1].both, rel=1e-3)


def preset(name: str, bits: float, kl: float) -> PresetResult:
    return PresetResult(name, bits, 100, kl, 0.9, 0.2)


def test_recommendation() -> None:
    small, middle, large = (preset(*one) for one in (("a", 2, 0.3), ("b", 3, 0.02), ("c", 4, 0.0)))
    found = recommend([large, small, middle])
    assert found.preset == "b"
    assert "b, 3.00 bits per element, chooses the same next token in 90.0%" in found.reason
    assert "0.0200 nats away" in found.reason
    assert "too far off: a, 2.00 bits" in found.reason
    assert "too far off" not in recommend([large]).reason
    none = recommend([small, preset("d", 5, 0.1)])
    assert none.preset is None
    assert "The nearest is d" in none.reason


def test_report(demo: Diagnosis, tmp_path: Path) -> None:
    files = write(demo, tmp_path / "some" / "folder")
    assert {file.name for file in files} == {
        "diagnosis.html", "diagnosis.json", "norms.png", "channels.png", "outlier.png", "steps.png",
    }  # fmt: skip
    page = files[-1].read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert page.count("src=") == len(pictures) == 4
    assert {base64.b64decode(one) for one in pictures} == {
        file.read_bytes() for file in files if file.suffix == ".png"
    }
    assert "&lt;demo&gt;" in page
    assert "<demo>" not in page
    assert f"{demo.steps[0].both:.4f}" in page
    assert page.count("<tr>") == 3 + len(demo.presets) + len(demo.steps) + 16
    assert all(len(row) == len(head_table(demo).header) for row in head_table(demo).rows)
    most = max(demo.sensitivity, key=lambda layer: demo.sensitivity[layer])
    assert f"layers={{{most}: OscarConfig.high()}}" in page
    saved = json.loads((files[0]).read_text())
    assert saved["sensitivity"] == {str(k): loss for k, loss in demo.sensitivity.items()}
    assert saved["layers"][2]["heads"][1]["keys"]["peak"] == demo.layers[2].heads[1].keys.peak
    assert saved["tokens_by_kind"] == {"text": 600}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        write(demo, tmp_path / "file")


@pytest.mark.parametrize(
    "losses",
    [
        [0.25] * 8,  # of what is spread three layers have less than half
        [0.25] * 6,  # exactly half
        [0.0009] + [0.0] * 7,  # all in one layer, and next to nothing
        [],  # not measured
    ],
)
def test_no_layer_is_named_without_need(demo: Diagnosis, losses: list[float]) -> None:
    found = findings(replace(demo, sensitivity=dict(enumerate(losses))))
    assert found == findings(demo)[:-1]


def test_the_layers_that_have_most_of_the_loss_are_named(demo: Diagnosis) -> None:
    losses = {0: 0.004, 1: 0.001, 3: 0.004, 5: 0.002, 6: 0.028, 7: 0.001}
    said = findings(replace(demo, sensitivity=losses))[-1]
    assert "all 6 layers" in said
    assert "0.0400 nats" in said
    assert "layers 6 (70%), 0 (10%), 3 (10%)." in said
    assert "layers={6: OscarConfig.high()}" in said


def harmed(demo: Diagnosis, **times: float) -> Diagnosis:
    """As if rotation multiplied errors so in the third layer, and changed nothing in others."""

    def changed(steps: list[StepErrors]) -> list[StepErrors]:
        plain = steps[0]
        errors = {part: factor * getattr(plain, part) for part, factor in times.items()}
        return [plain, replace(plain, **errors), *steps[2:]]

    layers = [
        replace(layer, steps=changed(layer.steps) if layer.index == 2 else [layer.steps[0]] * 5)
        for layer in demo.layers
    ]
    return replace(demo, layers=layers, steps=changed(demo.steps))


def test_what_is_said_where_rotation_harms(demo: Diagnosis) -> None:
    assert not any("Rotation makes" in one for one in findings(demo))
    found = harmed(demo, keys=3.0, both=2.5)
    (said,) = (one for one in findings(found) if "Rotation makes" in one)
    assert "most in layer 2 (2.5 times the error). " in said
    name = demo.steps[0].name
    off = median(head.key_groups[name].whole for layer in demo.layers for head in layer.heads)
    assert f"off by {off:.2f} without it and by {off:.2f} with it" in said
    assert said.endswith("compact is close enough all the same.")
    none = replace(found, recommendation=Recommendation(None, ""))
    (said,) = (one for one in findings(none) if "Rotation makes" in one)
    assert said.endswith("OscarConfig(key_bits=4, value_bits=4, key_group=32).")
    OscarConfig(key_bits=4, value_bits=4, key_group=32)
    # by values: nothing is said of keys
    (said,) = (
        one for one in findings(harmed(demo, values=9.0, both=2.5)) if "Rotation makes" in one
    )
    assert "Keys themselves" not in said


def test_without_matplotlib(
    demo: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "oscar_kv.evaluation.diagnose_plots", raising=False)
    files = write(demo, tmp_path)
    assert [file.name for file in files] == ["diagnosis.json", "diagnosis.html"]
    page = files[-1].read_text()
    assert "<img" not in page
    assert f"{demo.steps[0].both:.4f}" in page
