"""Every family, attention and way to feed tokens, in every mode that torch has for gradients, and
with the modes mixed over one cache."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from families import Family, each_family, page_counts, tokens
from support import tiny_model
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from oscar_kv import OscarCache, OscarConfig, OscarEncoderDecoderCache

Modes = list[Callable[[], AbstractContextManager[Any]]]

MODES: dict[str, Modes] = {
    "inference": [torch.inference_mode],
    "no_grad": [torch.no_grad],
    "grad": [torch.enable_grad],
    "mixed": [torch.inference_mode, torch.enable_grad, torch.no_grad],
}
WAYS = {
    "one turn": [300, 1, 1],
    "two turns": [200, 1, 1, 98, 1],
    "chunked prefill": [96, 96, 96, 12, 1],
}
EXACT = OscarConfig(recent_tokens=512)
TOLERANCE = 1e-4


def attending(family: Family, implementation: str) -> Any:
    """The family's model; skips a test of what it does not have."""
    if implementation == "sdpa" and not family.model("eager")._supports_sdpa:
        pytest.skip(f"{family.name} has no {implementation} attention")
    return family.model(implementation)


def fed(model: Any, chunks: list[int], cache: Any, modes: Modes) -> Tensor:
    """Logits of the last token of each chunk, one mode after the other."""
    ids, last = tokens(2, sum(chunks)), []
    for part, mode in zip(ids.split(chunks, 1), itertools.cycle(modes)):
        with mode():
            last.append(model(part, past_key_values=cache, use_cache=True).logits[:, -1])
    with torch.no_grad():
        return torch.stack([logits.detach().clone() for logits in last])


@pytest.mark.parametrize("implementation", ["oscar", "sdpa", "eager"])
@each_family()
def test_modes_change_nothing(family: Family, implementation: str) -> None:
    model = attending(family, implementation)
    for way, chunks in WAYS.items():
        wanted = fed(model, chunks, DynamicCache(config=model.config), MODES["no_grad"])
        quantized = None
        for mode, modes in MODES.items():
            exact = fed(model, chunks, OscarCache(model.config, EXACT), modes)
            assert (exact - wanted).abs().max() < TOLERANCE, (way, mode)
            cache = OscarCache(model.config, OscarConfig(recent_tokens=0))
            found = fed(model, chunks, cache, modes)
            assert page_counts(cache) == [2] * len(family.quantized)
            quantized = found if quantized is None else quantized
            assert (found - quantized).abs().max() < TOLERANCE, (way, mode)


@pytest.mark.parametrize("implementation", ["oscar", "sdpa", "eager"])
@each_family()
def test_prompt_lookup_in_every_mode(family: Family, implementation: str) -> None:
    model = attending(family, implementation)
    if family.has_recurrence:
        pytest.skip("Transformers does not roll back linear attention")
    ids = tokens(1, 20).repeat(1, 3)
    arguments = {"max_new_tokens": 6, "do_sample": False, "prompt_lookup_num_tokens": 3}
    theirs = DynamicCache(config=model.config)
    expected = model.generate(ids, past_key_values=theirs, **arguments).tolist()
    cache = OscarCache(model.config, EXACT)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad) * 3:
        with mode():
            cache.reset()
            assert model.generate(ids, past_key_values=cache, **arguments).tolist() == expected


@pytest.mark.parametrize("implementation", ["oscar", "sdpa", "eager"])
def test_modes_mix_over_what_a_decoder_reads_of_the_encoder(implementation: str) -> None:
    model = tiny_model("BartForConditionalGeneration")
    model.set_attn_implementation(implementation)
    ids, steps = tokens(1, 30), tokens(1, 12)
    said = []
    for first in range(4):
        cache: Any = (
            EncoderDecoderCache(DynamicCache(), DynamicCache())
            if first == 3
            else OscarEncoderDecoderCache(model.config, EXACT)
        )
        for number, part in enumerate(steps.split(3, 1)):
            mode = torch.no_grad if first == 3 else MODES["mixed"][(first + number) % 3]
            with mode():
                inputs = {"input_ids": ids, "decoder_input_ids": part}
                last = model(**inputs, past_key_values=cache).logits[:, -1]
            if number == 3:
                with torch.no_grad():
                    said.append(last.detach().clone())
        copy.deepcopy(cache)
    assert all((one - said[3]).abs().max() < TOLERANCE for one in said)
