"""Prompts for the tiny models of ``tiny_config.py``: text, and for some classes images or audio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_config import FIRST_SPECIAL_TOKEN
from torch import Tensor

Inputs = dict[str, Any]

PROMPT, PADDING = 400, 37
"""Tokens of a prompt, enough for a page beside the recent window, and how many are padding."""
PATCHES = 16
"""Of one image: ``tiny_config`` makes them 4 x 4."""
_MEDIA_AT = 50
"""Where the tokens that stand for an image or a sound begin."""


def text(length: int = PROMPT, batch: int = 2) -> Tensor:
    """Random tokens ``[batch, length]`` without the special ones, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, FIRST_SPECIAL_TOKEN, (batch, length), generator=generator)


def left_padded_text() -> Inputs:
    """Two prompts, the second padded on the left."""
    ids, mask = text(), torch.ones(2, PROMPT, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def reads_media(name: str) -> bool:
    """Whether prompts of this class hold an image or a sound, and not text alone."""
    return name in _MEDIA


def inputs_for(model: Any) -> Inputs:
    """Arguments of ``generate`` for ``model``."""
    media = _MEDIA.get(type(model).__name__)
    if media is not None:
        return media(model)
    if not model.config.is_encoder_decoder:
        return left_padded_text()
    if model.main_input_name != "input_ids":
        raise NotImplementedError(f"reads {model.main_input_name}, which the tests do not make")
    return {"input_ids": text(40), "decoder_input_ids": text()}


def later_turn(inputs: Inputs, number: int) -> Inputs:
    """What comes new in turn ``number`` of a conversation that began with ``inputs``.

    The tokens around the image or sound of ``inputs``, and pixels or a sound that are others.
    """
    turn = dict(inputs)
    for name, part in inputs.items():
        if part.shape[1:] == (PROMPT,):
            turn[name] = part[:, _MEDIA_AT - 10 : _MEDIA_AT + 60]
        elif part.is_floating_point():
            turn[name] = part.roll(number, -1)
    return turn


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _with_media(token: int, count: int, media: Inputs) -> Inputs:
    """A prompt with ``count`` tokens for the image or sound of ``media``."""
    inputs = left_padded_text()
    inputs["input_ids"][:, _MEDIA_AT : _MEDIA_AT + count] = token
    return inputs | media


def _image_token(config: Any) -> int:
    return getattr(config, "image_token_id", None) or config.image_token_index


def _pixels(vision: Any, *images: int) -> Tensor:
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return _noise(2, *images, 3, side, side)


def _plain_image(shrink: float = 1.0, types: bool = False, images: tuple[int, ...] = ()) -> Any:
    """Inputs of a model that takes square images, one token per ``shrink`` patches.

    Args:
        types: whether the model wants to be told which tokens are an image.
        images: extra dimensions of the pixels.
    """

    def build(model: Any) -> Inputs:
        config = model.config
        count = int(PATCHES / shrink)
        media = {"pixel_values": _pixels(config.vision_config, *images)}
        inputs = _with_media(_image_token(config), count, media)
        if types:
            inputs["token_type_ids"] = (inputs["input_ids"] == _image_token(config)).long()
        return inputs

    return build


def _llava_onevision(model: Any) -> Inputs:
    pixels = _pixels(model.config.vision_config, 2)  # the whole image, and one part of it
    sizes = torch.tensor([[pixels.shape[-1]] * 2] * 2)
    media = {"pixel_values": pixels, "image_sizes": sizes}
    with torch.no_grad():
        features = model.get_image_features(**media).pooler_output
    return _with_media(_image_token(model.config), len(features[0]), media)


def _qwen_image(model: Any) -> Inputs:
    vision = model.config.vision_config
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    pixels = channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, 4, 4]] * 2)
    media = {"pixel_values": _noise(2 * PATCHES, pixels), "image_grid_thw": grid}
    token = _image_token(model.config)
    inputs = _with_media(token, PATCHES // vision.spatial_merge_size**2, media)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
    return inputs


def _sound(model: Any) -> Tensor:
    audio = getattr(model.config, "audio_config", model.config)
    return _noise(2, audio.num_mel_bins, 2 * audio.max_source_positions)


def _qwen2_audio(model: Any) -> Inputs:
    sound = _sound(model)
    heard = torch.ones(2, sound.shape[-1], dtype=torch.long)
    media = {"input_features": sound, "feature_attention_mask": heard}
    return _with_media(model.config.audio_token_index, sound.shape[-1] // 4, media)


def _voxtral(model: Any) -> Inputs:
    sound = _sound(model)
    frames = model.config.audio_config.intermediate_size // model.config.audio_config.hidden_size
    count = sound.shape[-1] // 2 // frames
    return _with_media(model.config.audio_token_id, count, {"input_features": sound})


def _qwen_omni(model: Any) -> Inputs:
    """A sound and an image."""
    inputs = _qwen_image(model)
    del inputs["mm_token_type_ids"]
    sound = _noise(2, model.config.audio_config.num_mel_bins, 40)
    media = {
        "input_features": sound,
        "feature_attention_mask": torch.ones(2, 40, dtype=torch.long),
    }
    with torch.no_grad():
        heard = model.get_audio_features(**media)
    if not isinstance(heard, Tensor):  # depends on the model and the version
        pooled = getattr(heard, "pooler_output", None)
        heard = heard.last_hidden_state if pooled is None else pooled
    count = len(heard) // 2
    at = _MEDIA_AT + 40
    inputs["input_ids"][:, at : at + count] = model.config.audio_token_id
    inputs["input_ids"][:, at - 1] = model.config.audio_start_token_id
    inputs["input_ids"][:, _MEDIA_AT - 1] = model.config.vision_start_token_id
    return {**inputs, **media}


def _blip_2(model: Any) -> Inputs:
    media = {"pixel_values": _pixels(model.config.vision_config)}
    if "Instruct" in type(model).__name__:
        media["qformer_input_ids"] = text(10)
    return _with_media(_image_token(model.config), model.config.num_query_tokens, media)


def _idefics(model: Any) -> Inputs:
    seen = torch.ones(2, PROMPT, 1, dtype=torch.long)
    pixels = _pixels(model.config.vision_config, 1)
    return {**left_padded_text(), "pixel_values": pixels, "image_attention_mask": seen}


def _encoded(name: str, *shape: int) -> Callable[[Any], Inputs]:
    """Inputs of a model with an encoder that reads ``name``, two of ``shape``."""
    return lambda model: {name: _noise(2, *shape), "decoder_input_ids": text()}


def _whisper(model: Any) -> Inputs:
    return {"input_features": _sound(model), "decoder_input_ids": text()}


def _vision_encoder(model: Any) -> Inputs:
    return {"pixel_values": _pixels(model.config.encoder), "decoder_input_ids": text()}


_MEDIA: dict[str, Callable[[Any], Inputs]] = {
    "Blip2ForConditionalGeneration": _blip_2,
    "CanaryForConditionalGeneration": _encoded("input_features", 40, 16),
    "CohereAsrForConditionalGeneration": _encoded("input_features", 40, 16),
    "Gemma3ForConditionalGeneration": _plain_image(4, types=True),
    "Idefics3ForConditionalGeneration": _plain_image(4, images=(1,)),
    "IdeficsForVisionText2Text": _idefics,
    "InstructBlipForConditionalGeneration": _blip_2,
    "InternVLForConditionalGeneration": _plain_image(4),
    "LlavaForConditionalGeneration": _plain_image(),
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "MoonshineForConditionalGeneration": _encoded("input_values", 4000),
    "PaliGemmaForConditionalGeneration": _plain_image(types=True),
    "Qwen2AudioForConditionalGeneration": _qwen2_audio,
    "Qwen2VLForConditionalGeneration": _qwen_image,
    "Qwen2_5OmniThinkerForConditionalGeneration": _qwen_omni,
    "Qwen2_5_VLForConditionalGeneration": _qwen_image,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _qwen_omni,
    "Qwen3VLForConditionalGeneration": _qwen_image,
    "SeamlessM4TForSpeechToText": _encoded("input_features", 40, 160),
    "SeamlessM4Tv2ForSpeechToText": _encoded("input_features", 40, 160),
    "SmolVLMForConditionalGeneration": _plain_image(4, images=(1,)),
    "Speech2TextForConditionalGeneration": _encoded("input_features", 40, 80),
    "SpeechT5ForSpeechToText": _encoded("input_values", 4000),
    "VisionEncoderDecoderModel": _vision_encoder,
    "VoxtralForConditionalGeneration": _voxtral,
    "WhisperForConditionalGeneration": _whisper,
}
