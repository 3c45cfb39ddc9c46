"""Every class of Transformers that generates text, and what ``docs/models.md`` says about it.

A few classes of each kind by default; the others are ``slow`` (``make test-all``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import class_names, examine, examine_model, oscar_cache, tiny_model
from support_matrix import documented, documented_version, row
from tiny_inputs import inputs_for
from transformers import DynamicCache, EncoderDecoderCache

from oscar_kv import OscarCache, OscarConfig, OscarEncoderDecoderCache
from oscar_kv.integrations.layer import OscarLayer

SUBSET = (
    "BartForConditionalGeneration",
    "BloomForCausalLM",  # attention of its own
    "DeepseekV3ForCausalLM",  # latent attention
    "DoryForCausalLM",  # layers that run twice, each time with a cache layer of its own
    "FalconMambaForCausalLM",  # nothing to quantize
    "Gemma3ForConditionalGeneration",
    "GitForCausalLM",  # adds masks to scores, under any name of an attention
    "LlamaForCausalLM",
    "MllamaForConditionalGeneration",  # layers that cache images
    "PaliGemmaForConditionalGeneration",  # prompts attend in both directions
    "PegasusXForConditionalGeneration",  # does not say that it is causal
    "Qwen2_5OmniForConditionalGeneration",  # a thinker and a talker
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3NextForCausalLM",  # linear attention
    "Qwen3OmniMoeForConditionalGeneration",
    "T5ForConditionalGeneration",  # position biases
    "VoxtralForConditionalGeneration",
    "WhisperForConditionalGeneration",
)


def _each_class() -> list[object]:
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in class_names()]
    return [*SUBSET, *(case for case in slow if case.values[0] not in SUBSET)]


@pytest.mark.parametrize("name", _each_class())
def test_class_does_what_the_page_says(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    outcome = examine(name)
    assert outcome.status != "wrong", outcome.reason
    if transformers.__version__ == documented_version():
        assert row(outcome) in documented()[outcome.status]


def test_page_has_every_class_and_no_wrong_one() -> None:
    sections = documented()
    assert "wrong" not in sections
    supported = len(sections["packed"]) + len(sections["dequantized"])
    assert supported >= 60
    if transformers.__version__ == documented_version():
        named = [line.split("`")[1] for lines in sections.values() for line in lines]
        assert sorted(named) == class_names()


@pytest.mark.parametrize("window", [1024, 2048])
def test_a_window_as_long_as_any_text_is_full_attention(window: int) -> None:
    """As Phi-3 and Phi-4-mini have it. A shorter one is left to Transformers."""
    fields = {"max_position_embeddings": 1024, "original_max_position_embeddings": 1024}
    model = tiny_model("Phi3ForCausalLM", **fields, sliding_window=window)
    assert examine_model(model, inputs_for(model)).status == "packed"
    model.config.sliding_window = 1023
    with pytest.raises(ValueError, match="no full-attention layer to quantize"):
        OscarCache(model.config)


def test_encoder_decoder_needs_its_own_cache() -> None:
    """A plain one would get the encoder's states as if the decoder had written them."""
    model = tiny_model("T5ForConditionalGeneration")
    with pytest.raises(ValueError, match="use OscarEncoderDecoderCache"):
        OscarCache(model.config)
    with pytest.raises(ValueError, match="use OscarCache"):
        OscarEncoderDecoderCache(tiny_model("LlamaForCausalLM").config)
    with pytest.raises(TypeError, match=r"expected model\.config"):
        OscarEncoderDecoderCache(model)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def test_layers_of_a_decoder_have_configs_of_their_own() -> None:
    model = tiny_model("T5ForConditionalGeneration")
    cache = OscarEncoderDecoderCache(model.config, layers={1: OscarConfig.high()})
    model(
        input_ids=torch.ones(1, 5, dtype=torch.long),
        decoder_input_ids=torch.ones(1, 3, dtype=torch.long),
        past_key_values=cache,
    )
    configs = [packed.config for packed in cache.self_attention_cache.packed_layers()]
    assert configs == [OscarConfig(), OscarConfig.high()]
    assert not any(isinstance(x, OscarLayer) for x in cache.cross_attention_cache.layers)


@torch.no_grad()
def test_memory_of_an_encoder_decoder_cache() -> None:
    model = tiny_model("T5ForConditionalGeneration")
    cache = OscarEncoderDecoderCache(model.config)
    assert cache.nbytes == 0
    ids = torch.ones(1, 5, dtype=torch.long)
    model(input_ids=ids, decoder_input_ids=ids, past_key_values=cache)
    layers: Any = cache.cross_attention_cache.layers
    memory = cache.memory()
    assert memory.pop("encoder") == sum(x.keys.nbytes + x.values.nbytes for x in layers) > 0
    assert memory == cache.self_attention_cache.memory()
    assert cache.nbytes == sum(cache.memory().values())


def test_encoder_decoder_cache_can_be_cropped() -> None:
    model = tiny_model("T5ForConditionalGeneration")
    theirs = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = torch.arange(3, 23)[None]
    after = []
    for cache in (oscar_cache(model), theirs):
        with torch.no_grad():
            model(input_ids=ids, decoder_input_ids=ids, past_key_values=cache)
            cache.crop(-5)
            assert cache.get_seq_length() == 15
            out = model(input_ids=ids, decoder_input_ids=ids[:, :1], past_key_values=cache)
        after.append(out.logits)
    assert torch.allclose(*after, atol=1e-4)


def test_model_that_was_told_to_use_no_cache() -> None:
    config = tiny_model("LlamaForCausalLM").config
    config.use_cache = False
    with pytest.raises(ValueError, match="use_cache is False"):
        OscarCache(config)


def test_model_without_keys_and_values() -> None:
    with pytest.raises(ValueError, match="does not keep its keys and values"):
        OscarCache(transformers.RwkvConfig(num_hidden_layers=2))
