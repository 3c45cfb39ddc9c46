"""Captured attention is the model's own, and capturing it leaves the model as it was."""

from __future__ import annotations

from typing import Any

import checkpoints
import torch
from support import tiny_model
from torch import Tensor

from oscar_kv.evaluation.capture import capture, capture_attention


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
