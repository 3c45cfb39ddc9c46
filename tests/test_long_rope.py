"""Models with one RoPE for short texts and one for long ones: they read a text again at the border,
and ``generate`` drops the cache it was given."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import tokens
from torch import Tensor
from transformers import DynamicCache

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.chat import Conversation
from oscar_kv.demo import MODEL
from oscar_kv.generation import Loaded, continuation, load, quiet
from oscar_kv.integrations import models
from oscar_kv.integrations.models import DroppedCacheWarning, reread_beyond

LIMIT = 64
NEW = 12
EXACT = OscarConfig(recent_tokens=1024)

ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + 2 * index for index in range(16)],
    "original_max_position_embeddings": LIMIT,
}
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "initializer_range": 0.13,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": LIMIT,
    "tie_word_embeddings": False,
}


def config(kind: str, **fields: Any) -> Any:
    own: dict[str, Any] = {"rope_parameters": ROPE}
    if kind == "Phimoe":
        own["rope_parameters"] = {**ROPE, "short_mscale": 1.0, "long_mscale": 1.2}
        own["num_local_experts"] = 4
    return getattr(transformers, f"{kind}Config")(**{**COMMON, **own, **fields})


def model(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        config(kind, **fields), attn_implementation="oscar"
    ).eval()
    made.generation_config.eos_token_id = None
    return made


def generated(model: Any, ids: Tensor, **kwargs: Any) -> list[int]:
    """What Transformers says, with a cache of its own unless one is given."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **kwargs
    )
    return out[0, ids.shape[1] :].tolist()


def said(model: Any, prompt: Tensor, cache: Any, before: Tensor | None = None) -> list[int]:
    return [token.id for token in continuation(model, prompt, cache, NEW, before=before)]


def exact(model: Any) -> OscarCache:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DroppedCacheWarning)
        return OscarCache(model.config, EXACT)


@pytest.mark.parametrize("kind", ["Phi3", "Phimoe"])
@pytest.mark.parametrize("length", [40, LIMIT - NEW, LIMIT - 3, LIMIT - 1, LIMIT, LIMIT + 1, 100])
def test_our_loop_says_what_generate_says(kind: str, length: int) -> None:
    phi, ids = model(kind), tokens(1, length)
    # Without a cache: across the border Transformers 5.17 reads one token of a text it has dropped.
    expected = generated(phi, ids, use_cache=False)
    for cache in (DynamicCache(config=phi.config), exact(phi)):
        assert said(phi, ids, cache) == expected
        assert cache.get_seq_length() == length + NEW - 1


def test_the_border_matters() -> None:
    """Else the test above could not fail: with stale keys other tokens come out."""
    phi, ids = model("Phi3"), tokens(1, LIMIT - 3)
    phi.config.model_type = "another"
    assert said(phi, ids, DynamicCache(config=phi.config)) != generated(model("Phi3"), ids)


@pytest.mark.parametrize("held", [1, 30, LIMIT - 1, LIMIT, LIMIT + 1])
def test_a_later_turn_crosses_the_border(held: int) -> None:
    phi, ids = model("Phi3"), tokens(1, 90)
    before, new = ids[:, :held], ids[:, held:]
    cache = exact(phi)
    with torch.no_grad():
        phi(before, past_key_values=cache)
    assert said(phi, new, cache, before) == generated(phi, ids)


def test_what_the_cache_holds_has_to_be_known() -> None:
    phi, ids = model("Phi3"), tokens(1, 90)
    cache = exact(phi)
    with torch.no_grad():
        phi(ids[:, :30], past_key_values=cache)
    with pytest.raises(ValueError, match="before: expected the 30 tokens that the cache holds"):
        said(phi, ids[:, 30:], cache)
    assert cache.get_seq_length() == 30


def test_a_conversation_crosses_the_border() -> None:
    quiet()
    tokenizer = load(MODEL, "float32", "cpu").tokenizer
    phi = model("Phi3", vocab_size=len(tokenizer))
    conversation = Conversation(Loaded(phi, tokenizer), "full")
    for text in ("def square(x):\n", "    return x * x\n" * 4, "def cube(x):\n"):
        wanted = conversation._encode([*conversation.messages, {"role": "user", "content": text}])
        answer = [token.id for token, _ in conversation.reply(text, NEW)]
        assert answer == generated(phi, torch.tensor([wanted]))
    assert len(wanted) > LIMIT > len(tokenizer("def square(x):\n").input_ids) + NEW


def test_generate_drops_a_cache_and_we_say_so() -> None:
    """As long as this fails to hold, there is nothing to warn of."""
    phi = model("Phi3")
    with pytest.warns(DroppedCacheWarning, match=f"drops a cache of up to {LIMIT} tokens") as told:
        cache = OscarCache(phi.config)
    assert told[0].filename == __file__
    generated(phi, tokens(1, LIMIT + 1), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("length", [LIMIT + 2, 200])
def test_a_long_prompt_goes_into_the_cache_as_the_warning_says(length: int) -> None:
    phi, ids = model("Phi3"), tokens(1, length)
    cache = exact(phi)
    with torch.no_grad():
        phi(ids[:, :-1], past_key_values=cache)
    assert generated(phi, ids, past_key_values=cache) == generated(phi, ids)
    assert cache.get_seq_length() == length + NEW - 1


@pytest.mark.parametrize(
    "harmless",
    [
        config("Phi3", max_position_embeddings=LIMIT),  # no longer text is possible
        config("Llama"),  # generate keeps the cache
        transformers.Phi3Config(),
    ],
    ids=["short", "Llama", "default"],
)
def test_no_warning_without_a_reason(harmless: Any) -> None:
    assert reread_beyond(harmless) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OscarCache(harmless)


@pytest.mark.parametrize("name", ["phi3", "phi4_multimodal", "phimoe", "phi3_v", "phi4mm"])
def test_kinds_that_read_again(name: str) -> None:
    """The last two are code on the hub, whose configs are of that code, too."""
    made = config("Phi3")
    made.model_type = name
    assert reread_beyond(made) == LIMIT
    assert reread_beyond(transformers.Phi4MultimodalConfig()) == 4096


def test_every_model_that_drops_a_cache_is_known() -> None:
    """By the source of Transformers: where the name of the cache is set to None."""
    folder = Path(transformers.__file__).parent / "models"
    begin, dropped = (
        "def prepare_inputs_for_generation(",
        re.compile("(past_key_values|cache) = None\\n"),
    )
    found = set()
    for path in folder.glob("*/modeling_*.py"):
        for part in path.read_text(encoding="utf-8").split(begin)[1:]:
            if dropped.search(part.split("\n    def ")[0]):
                found.add(path.parent.name)
    assert found == {"phi3", "phi4_multimodal", "phimoe"}
    assert found <= set(models._TWO_ROPES)
