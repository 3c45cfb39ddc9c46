"""Tiny random models with the real processors of their families, built without the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from PIL import Image, ImageDraw
from support import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

SAMPLING_RATE = 16_000
IMAGE_SIDE = 56
"""Pixels: four patches of 14."""
_VISION = {"image_size": IMAGE_SIDE, "patch_size": 14}


@dataclass(frozen=True)
class Checkpoint:
    """A model, its processor and how it is asked.

    Attributes:
        mark: the text that stands for an image or a sound in a prompt.
        listens: whether it takes sounds, and not images.
    """

    model: Any
    processor: Any
    mark: str
    listens: bool = False

    def ask(self, text: str, medium: Any) -> Any:
        """Arguments of ``generate``: ``medium``, then ``text``."""
        sounds = {"audio": [medium], "sampling_rate": SAMPLING_RATE}
        media = sounds if self.listens else {"images": [[medium]]}
        return self.processor(text=[self.mark + text], **media, return_tensors="pt")


def image(color: str) -> Image.Image:
    """A square of ``color`` on a white ground."""
    drawn = Image.new("RGB", (80, 60), "white")
    ImageDraw.Draw(drawn).rectangle((20, 10, 60, 50), fill=color)
    return drawn


def sound(frequency: float, seconds: float = 0.8) -> np.ndarray:
    """A tone that rises to twice its frequency in Hz, float32 at 16 kHz."""
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    return np.sin(2 * np.pi * frequency * time * (1 + time / seconds / 2)).astype(np.float32)


def tokenizer(**special: str) -> Any:
    """Byte pairs learnt from a few words.

    Args:
        special: tokens by the names under which a processor looks for them.
    """
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", *special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(["what do you see, what do you hear, and what now?"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs, pad_token="<pad>", extra_special_tokens=special
    )


def llava() -> Checkpoint:
    words = tokenizer(image_token="<image>")
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIDE},
            crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        ),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _checkpoint("LlavaForConditionalGeneration", processor, vision_config=_VISION)


def gemma3() -> Checkpoint:
    words = tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
        words,
        image_seq_length=4,
    )
    return _checkpoint(
        "Gemma3ForConditionalGeneration",
        processor,
        mark=words.boi_token,
        vision_config=_VISION,
    )


def idefics3() -> Checkpoint:
    marks = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    words = tokenizer(**dict(zip(("image_token", "fake", "whole", "end"), marks)))
    size = {"longest_edge": IMAGE_SIDE}
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(size=size, max_image_size=size),
        words,
        image_seq_len=4,
    )
    return _checkpoint("Idefics3ForConditionalGeneration", processor, vision_config=_VISION)


class _QwenImages(transformers.Qwen2VLProcessor):
    """Without videos: what reads those needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(image_processor, tokenizer)


def qwen_vl() -> Checkpoint:
    words = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        begin="<|vision_start|>",
        end="<|vision_end|>",
    )
    pixels = {"shortest_edge": 28**2, "longest_edge": IMAGE_SIDE**2}
    processor = _QwenImages(transformers.Qwen2VLImageProcessorPil(size=pixels), words)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return _checkpoint("Qwen2_5_VLForConditionalGeneration", processor, mark=mark)


def qwen2_audio() -> Checkpoint:
    words = tokenizer(
        audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>"
    )
    processor = transformers.Qwen2AudioProcessor(_spectrogram(), words)
    return _checkpoint(
        "Qwen2AudioForConditionalGeneration",
        processor,
        mark="<|audio_bos|><|AUDIO|><|audio_eos|>",
        audio_config={"max_source_positions": 50},
    )


def whisper() -> Checkpoint:
    words = tokenizer(start="<|startoftranscript|>")
    processor = transformers.WhisperProcessor(_spectrogram(), words)
    model = tiny_model(
        "WhisperForConditionalGeneration", vocab_size=len(words), max_source_positions=50
    )
    return Checkpoint(model, processor, mark="")


def _spectrogram() -> WhisperFeatureExtractor:
    """100 frames, of a second."""
    return WhisperFeatureExtractor(
        feature_size=16, sampling_rate=SAMPLING_RATE, chunk_length=1, return_attention_mask=False
    )


def _checkpoint(name: str, processor: Any, mark: str = "", **overrides: Any) -> Checkpoint:
    words = processor.tokenizer
    kind = "audio" if hasattr(words, "audio_token") else "image"
    token = getattr(words, f"{kind}_token")
    overrides["text_config"] = {"vocab_size": len(words)}
    for field in (f"{kind}_token_id", f"{kind}_token_index"):
        overrides[field] = words.convert_tokens_to_ids(token)
    return Checkpoint(
        tiny_model(name, **overrides), processor, mark or token, listens=kind == "audio"
    )


BUILDERS: dict[str, Callable[[], Checkpoint]] = {
    "LLaVA": llava,
    "Gemma 3": gemma3,
    "Idefics3": idefics3,
    "Qwen2.5-VL": qwen_vl,
    "Qwen2-Audio": qwen2_audio,
}
"""Those that read a prompt with an image or a sound in it; Whisper has a decoder of its own."""
