"""Conversations over one cache that get a new image or sound in every turn.

A cache must change nothing where everything stays in the exact tail, and little with ``compact``.
What the caller has to do for a turn is the same with any cache: see ``docs/vision.md``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import (
    EXACT,
    EXACT_TOLERANCE,
    LEAST_CORRELATION,
    NEW_TOKENS,
    PACKED_TOLERANCE,
    Forced,
    correlation_of,
    pages,
    relative_gap,
    tiny_model,
    transformers_since,
)
from tiny_config import FIRST_SPECIAL_TOKEN, VOCABULARY
from tiny_inputs import Inputs, inputs_for, later_turn
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList

from oscar_kv import OscarCache

TURNS = 4
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Arguments of ``generate`` that are about the whole conversation; all others are about a turn."""

NAMES = (
    "Gemma3ForConditionalGeneration",  # images are seen from both sides
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",  # prompts are
    "Qwen2AudioForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",  # positions in time, height and width
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",  # images enter several layers
    "VoxtralForConditionalGeneration",
)
each_name = pytest.mark.parametrize("name", NAMES)


@torch.no_grad()
def converse(model: Any, cache: Any, answers: list[Tensor] | None = None) -> tuple[Inputs, Tensor]:
    """Holds a conversation over ``cache``.

    Args:
        answers: what the model is made to say in each turn; otherwise what it finds most likely.

    Returns:
        All that was given and said, as one prompt (without the last answer), and the logits
        ``[turns, steps, batch, vocabulary]``.
    """
    _forget_positions(model)
    first = inputs_for(model)
    said: Inputs = {name: first[name][:, :0] for name in PER_TOKEN if name in first}
    everything: Inputs = {}
    turns, logits = [], []
    for number in range(TURNS):
        turns.append(later_turn(first, number) if number else first)
        said = {name: torch.cat([said[name], turns[-1][name]], 1) for name in said}
        everything = _merged(model, turns) | said
        more: Inputs = {"position_ids": positions(model, everything)} if number else {}
        if answers is not None:
            more["logits_processor"] = LogitsProcessorList([Forced(answers[number])])
        out = generate(model, turns[-1] | said | more, cache)
        logits.append(torch.stack(out.logits).float())
        said = {name: pad(part, (0, NEW_TOKENS)) for name, part in said.items()}
        said["input_ids"] = out.sequences
        said["attention_mask"][:, -NEW_TOKENS:] = 1
    return everything, torch.stack(logits)


def generate(model: Any, inputs: Inputs, cache: Any) -> Any:
    """Greedy, without the tokens that stand for images and sounds."""
    return model.generate(
        **{name: part for name, part in inputs.items() if part is not None},
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=list(range(FIRST_SPECIAL_TOKEN, VOCABULARY)),
        output_logits=True,
        return_dict_in_generate=True,
    )


def positions(model: Any, everything: Inputs) -> Tensor | None:
    """Where all tokens are, ``[3, B, T]``, for a model that counts in three dimensions."""
    grid = everything.get("image_grid_thw")
    if grid is None:
        return None
    arguments = {"image_grid_thw": grid, "attention_mask": everything["attention_mask"]}
    if "mm_token_type_ids" in everything:
        arguments["mm_token_type_ids"] = everything["mm_token_type_ids"]
        return model.model.get_rope_index(everything["input_ids"], **arguments)[0]
    arguments["audio_seqlens"] = everything["feature_attention_mask"].sum(1)
    return model.get_rope_index(everything["input_ids"], **arguments)[0]


def exact(model: Any) -> tuple[Inputs, Tensor, list[Tensor]]:
    """The conversation with Transformers' own cache, and the answers in it."""
    everything, logits = converse(model, DynamicCache(config=model.config))
    allowed = logits[..., :FIRST_SPECIAL_TOKEN]
    return everything, logits, [turn.argmax(-1).T for turn in allowed]


@each_name
def test_exact_tail_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    said, logits, _ = exact(model)
    for implementation in ("sdpa", "oscar"):
        model.set_attn_implementation(implementation)
        said_too, logits_too = converse(model, OscarCache(model.config, EXACT))
        assert torch.equal(said_too["input_ids"], said["input_ids"])
        assert relative_gap(logits_too, logits) < EXACT_TOLERANCE


@each_name
def test_compact_stays_close(name: str) -> None:
    model = tiny_model(name)
    _, logits, answers = exact(model)
    runs = []
    for implementation in ("sdpa", "oscar"):
        model.set_attn_implementation(implementation)
        cache = OscarCache(model.config)
        runs.append(converse(model, cache, answers)[1])
        # Four of each row: the first turn, and the images or sounds of the next two.
        assert pages(cache) == 4 * 2 * sum(hasattr(layer, "packed") for layer in cache.layers)
        assert runs[-1].isfinite().all()
        for ours, theirs in zip(runs[-1], logits, strict=True):
            assert correlation_of(ours[1:], theirs[1:]) > LEAST_CORRELATION
        assert relative_gap(runs[-1][1:], logits[1:]) > EXACT_TOLERANCE
    assert relative_gap(*runs) < PACKED_TOLERANCE


@each_name
def test_later_turns_are_read_as_in_one_prompt(name: str) -> None:
    model = tiny_model(name)
    everything, logits = converse(model, OscarCache(model.config, EXACT))
    _forget_positions(model)
    at_once = generate(model, everything, DynamicCache(config=model.config))
    gap = relative_gap(logits[-1], torch.stack(at_once.logits).float())
    if name.startswith("PaliGemma"):
        assert gap > EXACT_TOLERANCE  # in one prompt, earlier turns would see later ones
    elif name.startswith("Gemma3") and not transformers_since(5, 23):
        # It sees later images from one side only.
        assert gap > EXACT_TOLERANCE
    else:
        assert gap < EXACT_TOLERANCE


def test_paligemma_reads_later_turns_causally() -> None:
    """Transformers, not the cache: it takes the types of new tokens for those of the first ones."""
    model = tiny_model("PaliGemmaForConditionalGeneration")
    first, logits = inputs_for(model), []
    for prefix in (True, False):
        cache = OscarCache(model.config)
        with torch.no_grad():
            model(**first, past_key_values=cache)
        turn = later_turn(first, 1)
        for tokens in ("input_ids", "attention_mask", "token_type_ids"):
            turn[tokens] = torch.cat([first[tokens], turn[tokens]], 1)
        turn["token_type_ids"] = (
            turn["token_type_ids"] if prefix else turn["token_type_ids"] * 0 + 1
        )
        logits.append(torch.stack(generate(model, turn, cache).logits))
    assert torch.equal(*logits)


def _forget_positions(model: Any) -> None:
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # what Qwen-VL remembers of the last prompt


def _merged(model: Any, turns: list[Inputs]) -> Inputs:
    """The images and sounds of all turns, sequence by sequence."""
    several_per_row = model.config.model_type == "idefics3"
    media = [name for name in turns[0] if name not in PER_TOKEN]
    merged: Inputs = {}
    for name in media:
        by_row = torch.cat([turn[name].unflatten(0, (2, -1)) for turn in turns], 1)
        merged[name] = by_row.flatten(1, 2) if several_per_row else by_row.flatten(0, 1)
    return merged
