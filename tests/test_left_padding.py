"""Left padding that a cache was told of: it is not stored, and sinks come after it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, each_family, left_padded, teacher_forced, tokens
from torch import Tensor

from oscar_kv import OscarCache, OscarConfig, load_cache, save_cache

IMPLEMENTATIONS = ["oscar", "sdpa", "eager"]
SINKS = OscarConfig(sink_tokens=4, recent_tokens=0)
QUANTIZED = ("Llama", "Gemma3Text", "GptOss", "GPTNeoX", "DeepseekV3", "Granite")


def attending(family: Family, implementation: str) -> Any:
    if implementation == "sdpa" and not family.model("eager")._supports_sdpa:
        pytest.skip(f"{family.name} has no {implementation} attention")
    return family.model(implementation)


def packed_of(cache: OscarCache) -> Any:
    return next(layer for layer in cache.layers if hasattr(layer, "packed"))


@pytest.mark.parametrize("chunks", [[300, 1, 5, 90, 1], [64, 64, 172, 1, 5, 91]], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_family(*QUANTIZED)
def test_a_padded_row_is_what_it_is_alone(
    family: Family, implementation: str, chunks: list[int]
) -> None:
    """To the last page, whatever the padding, also where it fills the first chunk of a prompt."""
    model, paddings = attending(family, implementation), [0, 130, 57]
    ids, mask = left_padded(tokens(3, sum(chunks)), paddings)
    cache = OscarCache(model.config, SINKS, starts=(mask == 0).sum(-1))
    together = teacher_forced(model, ids, chunks, cache, mask)
    assert cache.get_seq_length() == sum(chunks)
    for row, padding in enumerate(paddings):
        alone = OscarCache(model.config, SINKS)
        lengths = chunks[:]
        for index, length in enumerate(chunks):
            lengths[index] -= (gone := min(padding, length))
            padding -= gone
        lengths = [length for length in lengths if length]
        wanted = teacher_forced(model, ids[row : row + 1, -sum(lengths) :], lengths, alone)
        held, own = packed_of(cache).packed, packed_of(alone).packed
        assert held.lengths[row] == own.lengths[0] == sum(lengths)
        assert held.sinks_per_sequence[row] == 4
        assert torch.allclose(held.sink_keys[row], own.sink_keys[0], atol=1e-4)
        if len(chunks) == 5:  # else this row's chunks differ from those it has beside others
            assert (together[row, -sum(lengths) :] - wanted[0]).abs().max() < 2e-3


@torch.no_grad()
@each_family("Llama", "Gemma3Text")
def test_padding_is_hidden_and_takes_no_memory(family: Family) -> None:
    model = family.model("oscar")
    ids, mask = left_padded(tokens(2, 700), [0, 512])
    caches = [OscarCache(model.config, SINKS, starts=starts) for starts in ([0, 512], None)]
    for cache in caches:
        teacher_forced(model, ids, [700], cache, mask)
    told, untold = caches
    assert told.memory()["codes"] < untold.memory()["codes"]
    keys = packed_of(told).keys
    assert keys.shape[2] == 700
    assert not keys[1, :, :512].any()
    assert keys[1, :, 512].any()


@torch.no_grad()
def test_rows_with_padding_are_chosen_cropped_and_expanded() -> None:
    model = FAMILIES["Llama"].model("oscar")
    ids, mask = left_padded(tokens(2, 310), [0, 130])
    mask = torch.cat([mask, mask.new_ones(2, 8)], 1)

    def step(cache: OscarCache, ids: Tensor, mask: Tensor) -> Tensor:
        positions = mask.sum(-1, keepdim=True) - 1
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return model(ids, **inputs).logits[:, -1]

    def empty() -> OscarCache:
        return OscarCache(model.config, OscarConfig(sink_tokens=4), starts=[0, 130])

    def filled() -> OscarCache:
        cache = empty()
        teacher_forced(model, ids, [300, 10], cache, mask[:, :310])
        return cache

    next_ids = tokens(2, 1, seed=5)
    wanted = step(filled(), next_ids, mask[:, :311])
    rows = torch.tensor([1, 0, 1])
    for method, argument, kept in (
        ("reorder_cache", torch.tensor([1, 0]), torch.tensor([1, 0])),
        ("batch_select_indices", rows, rows),
        ("batch_repeat_interleave", 2, torch.tensor([0, 0, 1, 1])),
    ):
        cache = filled()
        getattr(cache, method)(argument)
        found = step(cache, next_ids[kept], mask[kept, :311])
        assert (found - wanted[kept]).abs().max() < 1e-4
    cache = filled()
    cache.crop(-10)
    again = teacher_forced(model, ids, [300, 10], empty(), mask[:, :310])[:, 300:]
    positions = (mask.cumsum(-1) - 1)[:, 300:310]
    found = model(
        ids[:, 300:310],
        attention_mask=mask[:, :310],
        position_ids=positions,
        past_key_values=cache,
    ).logits
    assert (found - again).abs().max() < 1e-4
    cache.crop(-300)  # into the padding of the second row
    assert cache.get_seq_length() == 10
    assert packed_of(cache).packed.lengths == [10, 0]
    cache = filled()
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-310)
    teacher_forced(model, ids, [310], cache)
    assert packed_of(cache).packed.lengths == [180, 180]
    cache.reset(starts=[3, 0])
    teacher_forced(model, ids, [310], cache)
    assert packed_of(cache).packed.lengths == [307, 310]
    cache.reset()
    teacher_forced(model, ids, [310], cache)
    assert packed_of(cache).packed.lengths == [310, 310]


@torch.no_grad()
def test_generate_with_beams_over_padded_prompts() -> None:
    """Transformers repeats every prompt before the cache sees it."""
    model = FAMILIES["Llama"].model("oscar")
    ids, mask = left_padded(tokens(2, 60), [0, 23])
    arguments = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    exact = OscarConfig(recent_tokens=512)
    told = OscarCache(model.config, exact, starts=(mask == 0).sum(-1))
    said = [
        model.generate(ids, past_key_values=cache, **arguments).tolist()
        for cache in (OscarCache(model.config, exact), told)
    ]
    assert said[0] == said[1]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["oscar", "eager"])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("padding", [0, 40])
def test_sinks_that_are_padding_are_said(padding: int, told: bool, implementation: str) -> None:
    """Where the mask is seen: by packed attention, once."""
    model = FAMILIES["Llama"].model(implementation)
    ids, mask = left_padded(tokens(2, 310), [0, padding])
    starts = (mask == 0).sum(-1) if told else None
    cache = OscarCache(model.config, SINKS, starts=starts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        teacher_forced(model, ids, [300, 1, 9], cache, mask)
    said = [one for one in caught if "left padding" in str(one.message)]
    expected = 2 if padding and not told and implementation == "oscar" else 0  # one a layer
    assert len(said) == expected


@torch.no_grad()
def test_starts_that_do_not_fit_are_named() -> None:
    model = FAMILIES["Llama"].model("oscar")
    with pytest.raises(ValueError, match=r"starts=\[-1\]"):
        OscarCache(model.config, starts=[-1])
    with pytest.raises(TypeError, match="starts="):
        OscarCache(model.config, starts=[0.5])  # pyright: ignore[reportArgumentType]
    cache = OscarCache(model.config, starts=[0, 7])
    with pytest.raises(ValueError, match=r"starts=\[0, 7\]: expected one for each of 3 sequences"):
        model(tokens(3, 20), past_key_values=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_saved_cache_knows_its_padding(tmp_path: Path) -> None:
    model = FAMILIES["Llama"].model("oscar")
    ids, mask = left_padded(tokens(2, 310), [0, 130])
    cache = OscarCache(model.config, SINKS, starts=[0, 130])
    teacher_forced(model, ids[:, :300], [300], cache, mask[:, :300])
    save_cache(cache, tmp_path / "prompt.safetensors", model)
    loaded = load_cache(tmp_path / "prompt.safetensors", model)
    assert loaded.get_seq_length() == 300
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, 300:]}
    found, wanted = (
        model(ids[:, 300:], past_key_values=one, **inputs).logits for one in (loaded, cache)
    )
    assert torch.equal(found, wanted)
