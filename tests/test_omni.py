"""Whole models that speak, with a cache for the thinker and one for the talker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omni import SPEAKING, prompt
from support import EXACT, pages, tiny_model
from torch import Tensor

from oscar_kv import OscarCache, OscarConfig


def speak(name: str, implementation: str, config: OscarConfig | None) -> tuple[Any, list[Any]]:
    """The tokens and the sound of an answer, and the caches of thinker and talker.

    Args:
        config: of both caches; ``None`` for those of Transformers.
    """
    model = tiny_model(name)
    caches, arguments = [], prompt(model)
    for part in ("thinker", "talker"):
        getattr(model, part).set_attn_implementation(implementation)
        if config is not None:
            cache = OscarCache(getattr(model.config, f"{part}_config"), config)
            arguments[f"{part}_past_key_values"] = cache
            caches.append(cache)
    torch.manual_seed(0)  # the sound begins as noise
    return model.generate(**arguments, talker_max_new_tokens=20), caches


@pytest.mark.parametrize("name", SPEAKING)
def test_exact_tail_changes_nothing(name: str) -> None:
    (tokens, sound), _ = speak(name, "sdpa", None)
    for implementation in ("sdpa", "oscar"):
        (tokens_too, sound_too), _ = speak(name, implementation, EXACT)
        assert torch.equal(tokens_too, tokens)
        assert sound_too.shape == sound.shape
        assert (sound_too - sound).abs().max() < 1e-3 * sound.std()


@pytest.mark.parametrize("name", SPEAKING)
@pytest.mark.parametrize("implementation", ["sdpa", "oscar"])
def test_compact(name: str, implementation: str) -> None:
    (tokens, sound), caches = speak(name, implementation, OscarConfig.compact())
    for cache in caches:
        assert pages(cache) == 2 * 2
        assert cache.memory()["codes"] > 0
    assert tokens.shape == (1, 400 + 8)
    assert isinstance(sound, Tensor)
    assert sound.isfinite().all()
    assert sound.std() > 0
