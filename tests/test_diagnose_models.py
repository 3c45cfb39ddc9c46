"""Models of every kind can be diagnosed, with images and sounds; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import tiny_inputs
import torch
from support import tiny_model
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from oscar_kv.evaluation.capture import capture_attention
from oscar_kv.evaluation.diagnose import diagnose, token_kinds
from oscar_kv.evaluation.diagnose_report import findings, write


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


def test_one_full_layer_with_one_wide_head(tmp_path: Path) -> None:
    """Gemma 3's shape: one KV head of 256 channels, one layer in six attends over everything."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=500, hidden_size=64, intermediate_size=64, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=64,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    ids = tiny_inputs.text(300, batch=1)
    found = diagnose(model, {"input_ids": ids[:, :280]}, ids[:, 280:])
    assert [layer.index for layer in found.layers] == list(found.sensitivity) == [5]
    said = findings(found)
    assert said[0].endswith("in 1 full-attention layer with 1 KV head in all.")
    assert found.layers[0].heads[0].values.kurtosis == pytest.approx(3, abs=0.3)
    assert found.presets[0].bits < 2.2
    page = write(found, tmp_path)[-1].read_text()
    assert page.count("<tr>") == 3 + len(found.presets) + len(found.steps) + 1
    assert page.count("<div class=wide><table>") == page.count("<table>") == 3


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
