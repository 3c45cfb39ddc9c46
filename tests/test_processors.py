"""From a picture or a sound and a text, through a family's real processor, to an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import BUILDERS, SAMPLING_RATE, Checkpoint, image, sound, whisper
from support import EXACT, EXACT_TOLERANCE, pages, relative_gap
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, EncoderDecoderCache

from oscar_kv import OscarCache, OscarConfig, OscarEncoderDecoderCache

QUESTION = "what do you see, what do you hear? " * 50
each_family = pytest.mark.parametrize("family", BUILDERS)


@pytest.fixture(name="checkpoint")
def _checkpoint(family: str) -> Checkpoint:
    try:
        return BUILDERS[family]()
    except ImportError as error:  # Idefics3 in Transformers 5.17
        pytest.skip(str(error).strip().splitlines()[0])


def media(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Two pictures or two sounds."""
    return (sound(300), sound(900)) if checkpoint.listens else (image("red"), image("blue"))


def answer(checkpoint: Checkpoint, inputs: Any, cache: Any) -> Any:
    return checkpoint.model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=checkpoint.processor.tokenizer.all_special_ids,
        output_logits=True,
        return_dict_in_generate=True,
    )


def dialogue(checkpoint: Checkpoint, cache: Any, implementation: str) -> tuple[str, Tensor]:
    """What is said in two turns, and the logits of both answers ``[steps, 1, vocabulary]``."""
    checkpoint.model.set_attn_implementation(implementation)
    one, other = media(checkpoint)
    first = checkpoint.ask(QUESTION, one)
    out = answer(checkpoint, first, cache)
    turn = checkpoint.ask("and now?", other)
    new_ids = turn["input_ids"]
    for types in ("token_type_ids", "mm_token_type_ids"):
        if types in turn:
            said = pad(first[types], (0, 6))
            turn[types] = torch.cat([said, turn[types]], 1)
    turn["input_ids"] = torch.cat([out.sequences, new_ids], 1)
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    if "image_grid_thw" in turn:
        turn["position_ids"], _ = checkpoint.model.model.get_rope_index(
            turn["input_ids"],
            mm_token_type_ids=turn["mm_token_type_ids"],
            image_grid_thw=torch.cat([first["image_grid_thw"], turn["image_grid_thw"]]),
        )
    last = answer(checkpoint, turn, cache)
    said = checkpoint.processor.batch_decode(last.sequences)[0]
    return said, torch.stack([*out.logits, *last.logits])


@each_family
def test_exact_tail_changes_nothing(checkpoint: Checkpoint) -> None:
    config = checkpoint.model.config
    said, logits = dialogue(checkpoint, DynamicCache(config=config), "sdpa")
    assert "and now?" in said
    for implementation in ("sdpa", "oscar"):
        ours, our_logits = dialogue(checkpoint, OscarCache(config, EXACT), implementation)
        assert ours == said
        assert relative_gap(our_logits, logits) < EXACT_TOLERANCE


@each_family
def test_compact_gives_the_same_answer_both_ways(checkpoint: Checkpoint) -> None:
    answers = []
    for implementation in ("sdpa", "oscar"):
        cache = OscarCache(checkpoint.model.config)
        said, logits = dialogue(checkpoint, cache, implementation)
        assert pages(cache)
        assert logits.isfinite().all()
        answers.append(said)
    assert answers[0] == answers[1]


@each_family
def test_what_is_seen_or_heard_matters(checkpoint: Checkpoint) -> None:
    logits = []
    for medium in media(checkpoint):
        cache = OscarCache(checkpoint.model.config)
        out = answer(checkpoint, checkpoint.ask(QUESTION, medium), cache)
        assert pages(cache)
        logits.append(torch.stack(out.logits))
    assert relative_gap(logits[0][:1], logits[1][:1]) > 10 * EXACT_TOLERANCE


def test_whisper() -> None:
    """Features of a sound in, tokens out; the decoder is given a long beginning to quantize."""
    checkpoint = whisper()
    model, processor = checkpoint.model, checkpoint.processor
    beginning = processor.tokenizer(QUESTION, return_tensors="pt")["input_ids"][:, :300]
    outputs = []
    for config in (None, EXACT, OscarConfig.compact()):
        inputs = processor(sound(300), sampling_rate=SAMPLING_RATE, return_tensors="pt")
        if config is not None:
            model.set_attn_implementation("oscar")
            inputs["past_key_values"] = OscarEncoderDecoderCache(model.config, config)
        ids = model.generate(
            **inputs, decoder_input_ids=beginning, max_new_tokens=6, do_sample=False
        )
        outputs.append(processor.batch_decode(ids)[0])
    assert outputs[1] == outputs[0]
    assert pages(inputs["past_key_values"]) == 2


def test_whisper_keeps_the_first_segment_in_a_given_cache() -> None:
    """Any cache, Transformers' own, too: hence one cache for one segment (``docs/audio.md``)."""
    checkpoint = whisper()
    model = checkpoint.model
    model.generation_config.no_timestamps_token_id = 200
    features = checkpoint.processor(
        sound(300, seconds=2.5),
        sampling_rate=SAMPLING_RATE,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    caches = (
        None,
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
        OscarEncoderDecoderCache(model.config, EXACT),
    )
    without, theirs, ours = (
        model.generate(
            **features,
            past_key_values=cache,
            max_new_tokens=6,
            return_timestamps=True,
            do_sample=False,
        ).tolist()
        for cache in caches
    )
    assert ours == theirs
    assert theirs != without
