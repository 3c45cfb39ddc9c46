"""Every model family: attending packed and attending over dequantized states are the same thing.

The two ways differ by float32 rounding, about 1e-5 on logits of standard deviation 1. Where a
hidden state sits on the edge between two codes, rounding can flip a code of a later layer, which
moves some logits by about 1e-4: hence ``TOLERANCE``. A mask that is off by one token, a wrong
scale or a stale page moves them by 0.01 to 1.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    Family,
    each_family,
    left_padded,
    page_counts,
    teacher_forced,
    tokens,
)
from transformers import DynamicCache, StaticCache

from oscar_kv import OscarConfig
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.transformers import OscarCache

TOLERANCE = 1e-3

# A prompt, single steps, a short chunk, one that is longer than a page, and steps again.
CHUNKS = [300, 1, 1, 1, 5, 200, 1, 1, 1]
PROMPT, LENGTH = CHUNKS[0], sum(CHUNKS)


def run(
    family: Family,
    implementation: str,
    config: OscarConfig | None,
    ids: torch.Tensor,
    chunks: list[int],
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """Logits and the cache, an exact ``DynamicCache`` where ``config`` is ``None``."""
    model = family.model(implementation)
    if config is None:
        cache = DynamicCache(config=model.config)
    else:
        cache = OscarCache(model.config, config)
    return teacher_forced(model, ids, chunks, cache, mask), cache


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("preset", ["compact", "paper"])
@each_family()
def test_packed_attention_agrees_with_dequantized_states(family: Family, preset: str) -> None:
    config = OscarConfig.preset(preset)
    ids = tokens(1, LENGTH)
    packed, cache = run(family, "oscar", config, ids, CHUNKS)
    dense, other = run(family, family.dense, config, ids, CHUNKS)
    pages = (LENGTH - config.recent_tokens) // 128
    assert page_counts(cache) == page_counts(other) == [pages] * len(family.quantized)
    assert largest_gap(packed, dense) < TOLERANCE


@each_family()
def test_only_full_attention_layers_are_quantized(family: Family) -> None:
    config = family.model("oscar").config
    theirs = DynamicCache(config=config).layers
    ours = OscarCache(config).layers
    letters = "".join("q" if isinstance(layer, OscarLayer) else "." for layer in ours)
    # Older Transformers have no cache layer at all where one shares the states of another.
    assert letters == family.layers[: len(theirs)]
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert index in family.quantized or type(our) is type(their)


@each_family()
def test_quantization_changes_little_but_something(family: Family) -> None:
    ids = tokens(1, LENGTH)
    quantized, _ = run(family, "oscar", OscarConfig.high(), ids, CHUNKS)
    exact, _ = run(family, family.dense, None, ids, CHUNKS)
    # The prompt attends over its exact self, whatever is stored.
    assert largest_gap(quantized[:, :PROMPT], exact[:, :PROMPT]) < 1e-4
    quantized, exact = quantized[:, PROMPT:], exact[:, PROMPT:]
    correlation = torch.corrcoef(torch.stack([quantized.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.9
    assert (quantized - exact).std() > 1e-3 * exact.std()


@each_family()
def test_padded_row_is_what_it_is_alone(family: Family) -> None:
    # A page full of padding: real tokens then share their pages with the same tokens in both.
    padding, chunks = 128, [300, 1, 5, 100, 1]
    ids = tokens(2, sum(chunks))
    ids, mask = left_padded(ids, [0, padding])
    together, cache = run(family, "oscar", OscarConfig.compact(), ids, chunks, mask)
    chunks[0] -= padding
    alone, other = run(family, "oscar", OscarConfig.compact(), ids[1:, padding:], chunks)
    assert page_counts(other) == [pages - 1 for pages in page_counts(cache)]
    assert page_counts(other)[0] >= 1
    assert largest_gap(together[1:, padding:], alone) < TOLERANCE


@each_family()
def test_short_padded_row_is_exact(family: Family) -> None:
    # Nothing is packed yet, so every way to compute this is the same.
    chunks = [60, 1, 9, 1]
    ids, mask = left_padded(tokens(2, sum(chunks)), [0, 23])
    padded, cache = run(family, "oscar", OscarConfig.compact(), ids, chunks, mask)
    assert not any(page_counts(cache))
    alone, _ = run(family, family.dense, None, ids[1:, 23:], [sum(chunks) - 23])
    assert largest_gap(padded[1:, 23:], alone) < 1e-4


@each_family()
def test_left_padded_batch_agrees_with_dequantized_states(family: Family) -> None:
    if family.name == "Gemma2":
        # Eager attention gives padding uniform attention instead of none. That reaches real
        # tokens through the key groups that they share with it.
        pytest.skip("what padding tokens compute depends on the attention implementation")
    chunks = [200, 1, 5, 190, 1]
    ids, mask = left_padded(tokens(2, sum(chunks)), [0, 37])
    packed, cache = run(family, "oscar", OscarConfig.compact(), ids, chunks, mask)
    dense, _ = run(family, family.dense, OscarConfig.compact(), ids, chunks, mask)
    assert page_counts(cache) == [2] * len(family.quantized)
    assert largest_gap(packed[mask.bool()], dense[mask.bool()]) < TOLERANCE


@each_family()
def test_exact_cache_under_oscar_attention(family: Family) -> None:
    chunks = [100, 1, 7, 60, 1]
    ids, mask = left_padded(tokens(2, sum(chunks)), [0, 37])
    for padding in (None, mask):
        ours, _ = run(family, "oscar", None, ids, chunks, padding)
        theirs, _ = run(family, family.dense, None, ids, chunks, padding)
        real = mask.bool() if padding is not None else torch.ones_like(mask).bool()
        assert largest_gap(ours[real], theirs[real]) < 1e-4


@each_family("Llama", "Gemma2", "Gemma3Text", "GptOss")
@pytest.mark.parametrize("padding", [0, 37])
def test_preallocated_cache_under_oscar_attention(family: Family, padding: int) -> None:
    chunks = [100, 1, 7, 1]
    ids, mask = left_padded(tokens(2, sum(chunks)), [0, padding])
    logits = []
    for implementation in ("oscar", family.dense):
        model = family.model(implementation)
        cache = StaticCache(config=model.config, max_cache_len=256)
        logits.append(teacher_forced(model, ids, chunks, cache, mask)[mask.bool()])
    assert largest_gap(*logits) < 1e-4


@each_family("Llama", "Gemma3Text", "GptOss", "Qwen3Next")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: Family, dtype: torch.dtype) -> None:
    ids, chunks = tokens(1, 310), [300, 1, 8, 1]
    model = copy.deepcopy(family.model("oscar")).to(dtype)
    cache = OscarCache(model.config, OscarConfig.high())
    packed = teacher_forced(model, ids, chunks, cache)
    model.set_attn_implementation(family.dense)
    exact = teacher_forced(model, ids, chunks, DynamicCache(config=model.config))
    assert packed.dtype == dtype
    assert page_counts(cache) == [1] * len(family.quantized)
    stacked = torch.stack([packed.float().flatten(), exact.float().flatten()])
    assert torch.corrcoef(stacked)[0, 1] > 0.98


def test_custom_mask_is_honoured_over_pages() -> None:
    family = FAMILIES["Llama"]
    ids, chunks = tokens(1, 310), [300, 10]
    hidden = torch.ones(1, 1, 10, 310, dtype=torch.bool).tril(300)
    hidden[..., 40:90] = False
    logits = []
    for implementation in ("oscar", "sdpa"):
        model = family.model(implementation)
        cache = OscarCache(model.config)
        teacher_forced(model, ids[:, :300], chunks[:1], cache)
        with torch.no_grad():
            out = model(ids[:, 300:], attention_mask=hidden, past_key_values=cache)
        logits.append(out.logits)
    plain, _ = run(family, "sdpa", OscarConfig.compact(), ids, chunks)
    assert largest_gap(*logits) < TOLERANCE
    assert largest_gap(logits[0], plain[:, 300:]) > 10 * TOLERANCE
