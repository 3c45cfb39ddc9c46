"""Models and configs that ``OscarCache`` refuses, with an error that says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, tokens
from transformers import LlamaConfig

from oscar_kv import OscarConfig
from oscar_kv.integrations.transformers import OscarCache


@pytest.mark.parametrize("wrong", [None, "llama", {"num_hidden_layers": 2}, torch.nn.Linear(2, 2)])
def test_model_config_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model_config"):
        OscarCache(wrong)


@pytest.mark.parametrize("wrong", ["compact", {"key_bits": 2}, OscarConfig, 2])
def test_config_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="config"):
        OscarCache(LlamaConfig(), wrong)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mistral", "FalconH1"])
def test_model_without_a_layer_to_quantize(name: str) -> None:
    fields = {"sliding_window": 64} if name == "Mistral" else {}
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=2, **fields)
    with pytest.raises(ValueError, match="no full-attention layer"):
        OscarCache(config)


@pytest.mark.parametrize("head_dim", [4, 12, 20])
@pytest.mark.parametrize("stated", [True, False])
def test_head_dim_without_a_layout(head_dim: int, stated: bool) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": 2 * head_dim}
    if stated:
        config: Any = LlamaConfig(**heads, head_dim=head_dim, num_hidden_layers=2)
    else:
        config = transformers.GPTNeoXConfig(**heads, num_hidden_layers=2)
    with pytest.raises(ValueError, match=str(head_dim)):
        OscarCache(config)


def test_float64_model() -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar")).double()
    with pytest.raises(TypeError, match="float64"):
        model(tokens(1, 8), past_key_values=OscarCache(FAMILIES["Llama"].config()))
    model.config.dtype = torch.float64
    with pytest.raises(TypeError, match="float64"):
        OscarCache(model.config)


def test_unknown_layer_type() -> None:
    config = FAMILIES["Gemma3Text"].config()
    config.layer_types = ["telepathy", "full_attention"]
    with pytest.raises(ValueError, match="unknown layer type 'telepathy'"):
        OscarCache(config)
