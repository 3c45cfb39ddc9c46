"""What ``oscar-kv diagnose`` measures, by hand; its presets, its report and its command."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny_inputs
import torch
from support import tiny_model
from torch import Tensor

from oscar_kv.cli import main
from oscar_kv.core.attention import attention
from oscar_kv.demo import MODEL
from oscar_kv.evaluation.capture import CapturedAttention, capture, capture_attention
from oscar_kv.evaluation.diagnose import (
    QUERIES,
    SMALLEST,
    Diagnosis,
    diagnose,
    measure_channels,
    measure_groups,
    measure_layer,
    measure_norms,
    steps,
    token_kinds,
)
from oscar_kv.evaluation.diagnose_presets import PresetResult, recommend
from oscar_kv.evaluation.diagnose_report import findings, head_table, write
from oscar_kv.evaluation.methods import Ablation, LayerStates, method
from oscar_kv.evaluation.quality import score
from oscar_kv.generation import load

# -- measurements by hand -------------------------------------------------------------------


def test_norms_by_hand() -> None:
    norms = torch.full((256,), 4.0)
    norms[0], norms[5], norms[200] = 1.0, 2.0, 12.0
    kinds = ["text"] * 200 + ["image"] * 56
    norms[201:] = 6.0
    found = measure_norms(norms, kinds)
    assert (found.minimum, found.median, found.maximum) == (1, 4, 12)
    assert found.low == [0]  # 2 is half of the median, not less
    assert found.large == [200]
    assert found.group_ratio == 4  # of the first 128; of the others 12 / 4
    assert found.median_by_kind == {"text": 4, "image": 6}
    mean = (1 + 2 + 198 * 4 + 12 + 55 * 6) / 256
    squares = (1 + 4 + 198 * 16 + 144 + 55 * 36) / 256
    assert found.variation == pytest.approx(math.sqrt(squares - mean**2) / mean)


def test_norms_of_zero_have_no_ratio() -> None:
    norms = torch.ones(128)
    norms[3] = 0
    found = measure_norms(norms, ["text"] * 128)
    assert found.group_ratio is None
    assert found.low == [3]
    assert found.median_by_kind == {}


def test_channels_by_hand() -> None:
    x = torch.ones(4, 4)
    x[:, 2] = 5.0
    x[1::2] *= -1
    found = measure_channels(x)
    assert found.peak == pytest.approx(5 / 2)
    assert found.kurtosis == pytest.approx(((3 + 625) / 4) / ((3 + 25) / 4) ** 2)
    zero = measure_channels(torch.zeros(4, 4))
    assert (zero.peak, zero.kurtosis) == (1, 3)


def test_groups_by_hand() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    read = torch.tensor([[3.0, 4.0], [0.0, 0.0], [2.0, 1.0], [1.0, 2.0]])
    found = measure_groups(exact, read, 2)
    assert found.whole == pytest.approx(math.sqrt(3 / 34))
    assert found.worst_group == pytest.approx(math.sqrt(2 / 8))
    assert found.median_group == pytest.approx(math.sqrt(1 / 26))
    assert found.worst_token == 1


def imbalanced(outlier: float = 1.0, spread: float = 0.0) -> CapturedAttention:
    """One layer of two KV heads with a channel outlier, or norms that vary."""
    generator = torch.Generator().manual_seed(0)
    length = SMALLEST + 40
    keys, values = torch.randn(2, 1, 2, length, 64, generator=generator)
    keys[..., 7] += outlier * keys[..., 7].sign()
    keys *= torch.exp(spread * torch.randn(length, 1, generator=generator))
    queries = torch.randn(1, 4, length, 64, generator=generator)
    return CapturedAttention(LayerStates(queries, keys, values), None, None, None, None)


def test_each_step_helps_against_what_it_is_for() -> None:
    plain, rotation, scaling, fit, large = (name for name, _ in steps(64))
    layer = measure_layer(0, imbalanced(spread=1.0), ["text"] * (SMALLEST + 40))
    for head in layer.heads:
        found = head.key_groups
        assert found[scaling].worst_token < 0.5 * found[rotation].worst_token
        assert head.norms.variation > 0.5
        assert head.norms.group_ratio is not None
        assert head.norms.group_ratio > 20
    layer = measure_layer(0, imbalanced(outlier=20), ["text"] * (SMALLEST + 40))
    for head in layer.heads:
        assert head.keys.peak > 10 > 4 > head.rotated_keys.peak
        assert head.keys.kurtosis > 20 > head.rotated_keys.kurtosis
    for one in (fit, large):
        assert layer.heads[0].value_groups[one].whole < layer.heads[0].value_groups[plain].whole


def test_errors_are_those_of_the_quantizer() -> None:
    captured = imbalanced(outlier=3)
    queries, keys, values = captured.states
    layer = measure_layer(3, captured, ["text"] * keys.shape[2])
    name, step = steps(64)[-1]
    read = step.quantize(keys[:, :, :128], values[:, :, :128], 0)
    keys_read = torch.cat([read.keys, keys[:, :, 128:]], 2)
    values_read = torch.cat([read.values, values[:, :, 128:]], 2)
    last = queries[:, :, -QUERIES:]
    exact = attention(last, keys, values)
    found = layer.steps[-1]
    assert (layer.index, found.name) == (3, name)
    assert found.bits == pytest.approx(read.bits / (2 * 2 * 128 * 64))
    for seen, measured in (
        ((keys_read, values), found.keys),
        ((keys, values_read), found.values),
        ((keys_read, values_read), found.both),
    ):
        expected = (attention(last, *seen) - exact).norm() / exact.norm()
        assert measured == pytest.approx(float(expected), rel=1e-4)
    both = attention(last, keys_read, values_read) - exact
    by_head = both[:, 2:].norm() / exact[:, 2:].norm()  # two query heads of the second KV head
    assert layer.heads[1].attention[name] == pytest.approx(float(by_head), rel=1e-4)


def test_the_last_step_is_compact() -> None:
    assert steps(64)[-1][1] == Ablation()
    assert steps(64)[0][1] == method(
        "ablation:rotation=false,token_scale=none,key_fit=minmax,value_fit=minmax,"
        "unbiased_norm=false,metadata=fp16,key_group=32,value_group=32"
    )
    assert steps(80)[0][1].value_group == 40


def test_states_that_are_not_finite() -> None:
    captured = imbalanced()
    captured.states.keys[0, 1, 5, 3] = torch.inf
    with pytest.raises(ValueError, match="layer 4: its keys or values are not finite"):
        measure_layer(4, captured, ["text"] * (SMALLEST + 40))


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


# -- models ---------------------------------------------------------------------------------


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


def test_layers_that_read_pictures_where_there_are_none() -> None:
    """Mllama's cross-attention layers: nothing is cached in them, and nothing measured."""
    model = tiny_model("MllamaForConditionalGeneration", text_config={"num_hidden_layers": 3})
    ids = tiny_inputs.text(320, batch=1)
    found = diagnose(model, {"input_ids": ids[:, :300]}, ids[:, 300:])
    assert model.config.text_config.cross_attention_layers == [1]
    assert [layer.index for layer in found.layers] == list(found.sensitivity) == [0, 2]
    assert all(loss > 0 for loss in found.sensitivity.values())
    assert found.presets[0].tokens == 20
    assert found.presets[0].kl > 0


@pytest.mark.parametrize("family", ["LLaVA", "Gemma 3", "Qwen2.5-VL", "Qwen2-Audio"])
def test_images_and_sounds(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoints.BUILDERS[family]()
    medium = checkpoints.sound(440) if checkpoint.listens else checkpoints.image("red")
    inputs = checkpoint.ask("what do you see, " * 60, medium)
    before = checkpoint.model.config._attn_implementation
    found = diagnose(checkpoint.model, inputs)
    assert checkpoint.model.config._attn_implementation == before
    kind = "audio" if checkpoint.listens else "image"
    assert found.tokens == inputs["input_ids"].shape[1]
    assert found.tokens_by_kind.keys() == {"text", kind}
    states = capture_attention(checkpoint.model, inputs)[found.layers[0].index].states
    where = torch.tensor([one == kind for one in found.kinds])
    norm = states.keys[0, 0].norm(dim=-1)[where]
    by_kind = found.layers[0].heads[0].norms.median_by_kind
    assert by_kind[kind] == pytest.approx(float(norm.median()), rel=1e-5)
    assert any(f"Keys of {kind} tokens have" in one for one in findings(found))
    assert all(0 < one.both < 2 for one in found.steps)
    assert 0 < found.presets[0].tokens <= 64
    assert not found.sensitivity
    write(found, tmp_path)


def test_captured_attention_is_the_models_own() -> None:
    """Masks, scales, soft caps and sinks as the model has them."""
    ids = {"input_ids": torch.arange(40)[None] % 30}
    image = checkpoints.gemma3()
    for model, inputs in (
        (tiny_model("Gemma2ForCausalLM", attn_logit_softcapping=1.0), ids),
        (tiny_model("GptOssForCausalLM"), ids),
        (image.model, image.ask("what?", checkpoints.image("blue"))),
    ):
        outputs = record_outputs(model, inputs)
        for index, layer in capture_attention(model, inputs).items():
            got = layer.attend(layer.states.keys, layer.states.values, 8)
            torch.testing.assert_close(got, outputs[index][:, :, -8:], rtol=1e-3, atol=1e-4)


def record_outputs(model: Any, inputs: Any) -> dict[int, Tensor]:
    """What goes into every layer's output projection, ``[B, Hq, T, E]``."""
    found: dict[int, Tensor] = {}
    hooks = []
    for part in model.modules():
        index = getattr(part, "layer_idx", None)
        if index is not None and hasattr(part, "o_proj"):

            def note(_: Any, args: tuple[Tensor], index: int = index, part: Any = part) -> None:
                found[index] = args[0].unflatten(-1, (-1, part.head_dim)).transpose(1, 2)

            hooks.append(part.o_proj.register_forward_pre_hook(note))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_capture_gives_the_parts_of_a_model_their_attention_back() -> None:
    model = checkpoints.llava().model
    model.set_attn_implementation("eager")
    model.model.vision_tower.set_attn_implementation("sdpa")
    capture(model, torch.arange(5, 30)[None])
    assert model.config.text_config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_token_kinds() -> None:
    config = checkpoints.qwen_vl().model.config
    ids = torch.tensor([[5, config.image_token_id, config.video_token_id, 6]])
    assert token_kinds(config, ids) == ["text", "image", "video", "text"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids: expected one sequence"),
        ({"input_ids": torch.ones(2, 300, dtype=torch.long)}, "not \\(2, 300\\)"),
        ({"input_ids": torch.ones(1, 255, dtype=torch.long)}, "255 tokens of input: expected at"),
        (
            {
                "input_ids": torch.ones(1, 300, dtype=torch.long),
                "attention_mask": torch.arange(300)[None] > 3,
            },
            "without padding",
        ),
    ],
)
def test_bad_inputs(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(tiny_model("LlamaForCausalLM"), inputs)


def test_models_that_have_no_such_cache() -> None:
    ids = {"input_ids": torch.ones(1, 300, dtype=torch.long)}
    with pytest.raises(ValueError, match="has an encoder"):
        diagnose(tiny_model("T5ForConditionalGeneration"), ids)


# -- the command ----------------------------------------------------------------------------


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("diagnose", "--tokens", 400, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["model"], printed["tokens"]) == ("demo", 272)
    assert printed["presets"][0]["tokens"] == 128
    saved = json.loads((out / "diagnosis.json").read_text())
    assert saved == printed


def test_command_with_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 60)
    args = ("diagnose", "--model", MODEL, "--out", tmp_path / "out", "--tokens", 400)
    assert run(*args, "--text", text) == 0
    shown = capsys.readouterr().out
    assert "Recommended: " in shown
    assert "+ token scaling" in shown
    text.write_text("import os\n")
    assert run(*args, "--text", text) == 2
    assert "expected at least 384" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe\x00")
    assert run(*args, "--text", text) == 2
    assert run(*args, "--text", tmp_path / "none") == 2
    assert run("diagnose", "--model", tmp_path / "none") == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["cannot read" in line for line in errors] == [True, True, False]
    assert "cannot load" in errors[-1]


def test_command_with_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoints.llava()
    checkpoint.model.save_pretrained(tmp_path / "llava")
    checkpoint.processor.save_pretrained(tmp_path / "llava")
    text, picture = tmp_path / "text.txt", tmp_path / "picture.png"
    text.write_text("what do you see? " * 60)
    checkpoints.image("red").save(picture)
    args = ("diagnose", "--model", tmp_path / "llava", "--out", tmp_path / "out", "--text", text)
    pictures = ("--image", picture, "--image", picture)
    assert run(*args, *pictures, "--tokens", 290, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens_by_kind"]["image"] == 2 * 16
    assert printed["tokens_by_kind"]["text"] in (289, 290, 291)  # decoded and read again
    # the same through a chat template
    checkpoint.processor.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    )
    checkpoint.processor.save_pretrained(tmp_path / "llava")
    assert run(*args, *pictures, "--tokens", 290, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == printed["layers"]
    limit = checkpoint.model.config.text_config.max_position_embeddings
    text.write_text("what do you see? " * limit)
    assert run(*args, *pictures, "--tokens", limit) == 2
    assert f"this model takes {limit}" in capsys.readouterr().err
    assert run(*args, "--image", text) == 2
    assert "cannot identify" in capsys.readouterr().err
    assert run("diagnose", "--model", MODEL, "--image", picture) == 2
    assert "cannot load" in capsys.readouterr().err
