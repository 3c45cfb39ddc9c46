"""``generate``: what it returns is the same attended packed or over dequantized states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import Family, each_family, left_padded, page_counts, teacher_forced, tokens
from support import transformers_since
from torch import Tensor

from oscar_kv import OscarConfig
from oscar_kv.integrations.encoder_decoder import OscarEncoderDecoderCache
from oscar_kv.integrations.transformers import OscarCache

# One family per kind of attention: plain, soft-capped, sliding, with sinks, recurrent, shared.
each_kind = each_family("Llama", "Gemma2", "Gemma3Text", "GptOss", "Qwen3Next", "Gemma4Text")

PAGED_PROMPT = 300
"""Tokens of which ``compact`` packs one page; the next page is complete at 384."""


def generate(
    family: Family,
    implementation: str,
    ids: Tensor,
    *,
    config: OscarConfig | None = None,
    cache: OscarCache | None = None,
    seed: int = 0,
    **arguments: Any,
) -> tuple[Tensor, OscarCache]:
    """What ``generate`` returns, prompt included, and the cache it leaves."""
    model = family.model(implementation)
    cache = OscarCache(model.config, config) if cache is None else cache
    arguments = {"max_new_tokens": 12, "do_sample": False, **arguments}
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    torch.manual_seed(seed)
    return model.generate(ids, past_key_values=cache, **arguments), cache


def assert_same_both_ways(family: Family, ids: Tensor, **arguments: Any) -> Tensor:
    """Generates packed and dequantized, and returns the tokens once they are the same."""
    packed, cache = generate(family, "oscar", ids, **arguments)
    dense, _ = generate(family, family.dense, ids, **arguments)
    assert all(page_counts(cache))
    assert packed.tolist() == dense.tolist()
    return packed


def recorded(monkeypatch: pytest.MonkeyPatch, method: str) -> list[Any]:
    """The arguments of every call of a one-argument method of ``OscarCache`` from now on."""
    arguments: list[Any] = []
    original = getattr(OscarCache, method)

    def recording(self: OscarCache, argument: Any) -> None:
        arguments.append(argument)
        original(self, argument)

    monkeypatch.setattr(OscarCache, method, recording)
    return arguments


def after_reading(family: Family, implementation: str, ids: Tensor) -> OscarCache:
    """A cache that holds ``ids``."""
    model = family.model(implementation)
    cache = OscarCache(model.config)
    teacher_forced(model, ids, [ids.shape[1]], cache)
    return cache


@each_family()
def test_greedy(family: Family) -> None:
    assert_same_both_ways(family, tokens(1, PAGED_PROMPT))


@each_family()
def test_greedy_batch_with_left_padding(family: Family) -> None:
    ids, mask = left_padded(tokens(2, PAGED_PROMPT), [0, 128])
    out = assert_same_both_ways(family, ids, attention_mask=mask)
    # A page of nothing but padding: the second row must not notice it.
    alone, _ = generate(family, "oscar", ids[1:, 128:])
    assert out[1, 128:].tolist() == alone[0].tolist()


@each_kind
def test_greedy_with_the_paper_preset(family: Family) -> None:
    # Pages complete during generation: at 256 and, with every chunk, nothing stays behind.
    ids = tokens(2, 250)
    _, cache = generate(family, "oscar", ids, config=OscarConfig.paper())
    assert page_counts(cache)[0] == 2
    assert_same_both_ways(family, ids, config=OscarConfig.paper())


@each_kind
def test_sampling(family: Family) -> None:
    ids = tokens(1, PAGED_PROMPT)
    out = assert_same_both_ways(family, ids, do_sample=True, num_return_sequences=3, seed=5)
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert (
        out.tolist()
        != assert_same_both_ways(
            family, ids, do_sample=True, num_return_sequences=3, seed=6
        ).tolist()
    )


@each_family()
def test_beam_search(family: Family) -> None:
    ids, mask = left_padded(tokens(2, PAGED_PROMPT), [0, 128])
    arguments = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    out = assert_same_both_ways(family, ids, **arguments)
    assert out.shape[0] == 4


@each_kind
def test_beam_search_across_a_new_page(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beams that share pages complete the next one, each its own.
    ids = tokens(1, 380)
    orders = recorded(monkeypatch, "reorder_cache")
    out, cache = generate(family, "oscar", ids, num_beams=3, num_return_sequences=3)
    assert page_counts(cache)[0] == 2
    assert any(order.tolist() != [0, 1, 2] for order in orders)
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert_same_both_ways(family, ids, num_beams=3, num_return_sequences=3)


@each_kind
def test_several_turns(family: Family) -> None:
    dialogues = []
    for implementation in ("oscar", family.dense):
        ids = tokens(1, 200)
        cache = OscarCache(family.model(implementation).config)
        for turn in range(3):
            ids, _ = generate(family, implementation, ids, cache=cache, max_new_tokens=6)
            # The last token has been chosen but not yet been seen.
            assert cache.get_seq_length() == ids.shape[1] - 1
            ids = torch.cat([ids, tokens(1, 70, seed=turn + 1)], 1)
        assert page_counts(cache)[0] == 1
        dialogues.append(ids.tolist())
    assert dialogues[0] == dialogues[1]


@each_kind
def test_chunked_prefill(family: Family) -> None:
    ids = tokens(1, PAGED_PROMPT)
    assert_same_both_ways(family, ids, prefill_chunk_size=64)
    # Within the tail, chunks change nothing.
    short = ids[:, :100]
    chunked, _ = generate(family, "oscar", short, prefill_chunk_size=33)
    assert chunked.tolist() == generate(family, "oscar", short)[0].tolist()


@each_family("Llama", "Gemma2", "Gemma3Text", "GptOss", "Lfm2", "Gemma4Text")
@pytest.mark.parametrize("drafts", ["model", "prompt"])
def test_assisted_generation(family: Family, drafts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafted tokens are verified a few at a time, and the cache rolls back what was rejected.

    As long as nothing is packed the result is what plain greedy search gives. Later it need not
    be: the first drafts come with the prompt and attend over its exact states, and a page may be
    packed up to one draft earlier.
    """
    ids = tokens(1, 30).repeat(1, 10)  # repetitive, so that looking up the prompt finds drafts
    arguments: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if drafts == "model":
        if family.name not in ("Llama", "Lfm2") and not transformers_since(5, 23):
            pytest.skip("Transformers' own sliding-window cache of the assistant fails")
        arguments = {"assistant_model": _perturbed(family.model("eager"))}
    arguments["max_new_tokens"] = 40
    removed = recorded(monkeypatch, "crop")
    assert_same_both_ways(family, ids, **arguments)
    assert any(removed)
    assert not all(removed)
    short = ids[:, :100]
    assisted, _ = generate(family, "oscar", short, **arguments)
    plain, _ = generate(family, "oscar", short, max_new_tokens=40)
    assert assisted.tolist() == plain.tolist()


@each_family("Llama", "GptOss")
@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_assisted_generation_across_pages(family: Family, preset: str) -> None:
    ids = tokens(1, 37).repeat(1, 10)
    config = OscarConfig.preset(preset)
    out = assert_same_both_ways(
        family, ids, config=config, max_new_tokens=40, prompt_lookup_num_tokens=6
    )
    assert out.shape[1] == 410


@each_family("Llama", "GptOss")
def test_a_kept_cache_continues_where_it_was(family: Family) -> None:
    """The prefix of several prompts is computed once and copied."""
    prefix, questions = tokens(1, PAGED_PROMPT), [tokens(1, 9, seed=s) for s in (1, 2)]
    kept = after_reading(family, "oscar", prefix)
    answers = []
    for question in questions:
        ids = torch.cat([prefix, question], 1)
        out, _ = generate(family, "oscar", ids, cache=copy.deepcopy(kept))
        expected, _ = generate(family, "oscar", ids, cache=after_reading(family, "oscar", prefix))
        assert out.tolist() == expected.tolist()
        answers.append(out[0, -12:].tolist())
    assert answers[0] != answers[1]
    assert kept.get_seq_length() == PAGED_PROMPT


@each_kind
def test_a_reset_cache_is_as_good_as_new(family: Family) -> None:
    ids = tokens(2, PAGED_PROMPT)
    first, cache = generate(family, "oscar", ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    again, _ = generate(family, "oscar", ids, cache=cache)
    assert again.tolist() == first.tolist()
    if family.layers == "qq":  # linear layers keep their batch size
        cache.reset()
        again, _ = generate(family, "oscar", ids[1:], cache=cache)
        assert again[0].tolist() == first[1].tolist()


def test_encoder_decoder() -> None:
    """The decoder's own states are quantized; those it reads from the encoder are not."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=97,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=512,
        init_std=0.13,
        eos_token_id=None,
        forced_eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model: Any = BartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    for implementation in ("oscar", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = OscarEncoderDecoderCache(config, OscarConfig.paper())
        outputs.append(
            model.generate(
                tokens(2, 150),
                decoder_input_ids=tokens(2, 140, seed=1),
                past_key_values=cache,
                max_new_tokens=10,
                num_beams=2,
            ).tolist()
        )
        assert page_counts(cache.self_attention_cache) == [1, 1]
    assert outputs[0] == outputs[1]


def _perturbed(model: Any) -> Any:
    """A draft model that agrees with ``model`` often, but not always."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in draft.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * parameter.data.std() * noise if parameter.numel() > 1 else 0
    draft.set_attn_implementation("eager")
    return draft
