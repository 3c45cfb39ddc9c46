"""Models that speak: a thinker that reads and writes, and a talker that says what it wrote.

Transformers generates with both in one call. A cache belongs to one of them.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from tiny_inputs import Inputs, inputs_for
from torch import Tensor

SPEAKING = ("Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration")


def prompt(model: Any) -> Inputs:
    """Arguments of ``generate`` for a whole model: one prompt with an image and a sound."""
    inputs = {name: part[: len(part) // 2] for name, part in inputs_for(model.thinker).items()}
    if hasattr(model, "speaker_map"):
        _lend_a_voice(model)
        # Given to both, as an argument without a prefix is, pixels would be refused by the talker.
        inputs["thinker_pixel_values"] = inputs.pop("pixel_values")
        inputs |= {"talker_eos_token_id": [0], "token2wav_num_steps": 2}
    else:  # it has to see who says what
        config, ids = model.config, inputs["input_ids"][0]
        ids[:2] = torch.tensor([config.im_start_token_id, config.user_token_id])
        ids[-3:-1] = torch.tensor([config.im_start_token_id, config.assistant_token_id])
        inputs |= {"thinker_eos_token_id": None}
    return {**inputs, "thinker_max_new_tokens": 8, "talker_do_sample": False}


def parts(model: Any) -> list[tuple[Any, Inputs]]:
    """Thinker and talker, and what ``generate`` of each gets."""
    if hasattr(model.talker, "code_predictor"):
        # Its codes go into the next step. They are an argmax over hidden states, which what
        # quantization loses may flip: silent ones keep the steps of two runs comparable.
        for embedding in model.talker.code_predictor.get_input_embeddings():
            torch.nn.init.zeros_(embedding.weight)
    return [(model.thinker, inputs_for(model.thinker)), (model.talker, _heard_by_talker(model))]


def _heard_by_talker(model: Any) -> Inputs:
    talker = model.talker
    with mock.patch.object(talker, "generate", wraps=talker.generate) as generate:
        model.generate(**prompt(model), talker_max_new_tokens=8)
    tensors = {k: v for k, v in generate.call_args.kwargs.items() if isinstance(v, Tensor)}
    return {**tensors, "output_hidden_states": True}  # which Qwen3-Omni needs


def _lend_a_voice(model: Any) -> None:
    """Qwen2.5-Omni keeps what it has to know of a speaker in a file of its own."""
    config = model.config.token2wav_config.dit_config
    voice = {
        "bos_token": 3,
        "cond": torch.zeros(1, config.enc_emb_dim),
        "ref_mel": torch.zeros(1, 30, config.mel_dim),
    }
    model.speaker_map["Chelsie"] = voice
