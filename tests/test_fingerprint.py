"""A fingerprint is the same wherever a model's weights are, and another for any other model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from families import FAMILIES, each_family
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from oscar_kv.integrations.compile import compile_layers
from oscar_kv.integrations.fingerprint import difference, fingerprint


def llama() -> Any:
    return copy.deepcopy(FAMILIES["Llama"].model("sdpa"))


@each_family()
def test_a_model_saved_and_loaded_stays_the_same(family: Any, tmp_path: Path) -> None:
    model = family.model("oscar")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, folder: cpu_offload(model),
        lambda model, folder: disk_offload(model, str(folder)),
        lambda model, folder: model.train(),
        lambda model, folder: model.requires_grad_(False),
        lambda model, folder: model.set_attn_implementation("eager"),
        lambda model, folder: compile_layers(model),
        lambda model, folder: model.model.layers.__setitem__(
            1, torch.compile(model.model.layers[1])
        ),
        lambda model, folder: model.config.update({"use_cache": False, "eos_token_id": [3, 4]}),
        lambda model, folder: _other_memory(model),
    ],
)
def test_what_changes_no_result(change: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    model = llama()
    change(model, tmp_path)
    assert fingerprint(model) == fingerprint(llama())


def _compile(layers: Any) -> None:
    layers[1] = torch.compile(layers[1])


def _other_memory(model: Any) -> None:
    """The same weights in another order of memory, and not at a multiple of 8 bytes."""
    weight, norm = model.lm_head.weight, model.model.norm.weight
    weight.data = weight.data.t().contiguous().t()
    norm.data = torch.cat([norm.data[:1], norm.data])[1:]


def _change(model: Any, place: int) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight.view(-1)[place] = torch.nextafter(weight.view(-1)[place], torch.tensor(torch.inf))


def _permute(model: Any, dim: int) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.flip(dim)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: _change(model, 0), "other weights"),
        (lambda model: _change(model, -1), "other weights"),
        (lambda model: _change(model, 3333), "other weights"),
        (lambda model: _permute(model, 0), "other weights"),
        (lambda model: _permute(model, 1), "other weights"),
        (lambda model: model.model.layers.insert(1, model.model.layers.pop(0)), "other weights"),
        (lambda model: model.model.layers.pop(1), "other weights"),
        (lambda model: model.model.register_buffer("bias", torch.zeros(1)), "other weights"),
        (lambda model: model.bfloat16(), "dtype=torch.float32: this one has torch.bfloat16"),
        (lambda model: model.lm_head.bfloat16(), "other weights"),
    ],
)
def test_what_changes_results(change: Callable[[Any], Any], told: str) -> None:
    model = llama()
    change(model)
    assert told in (difference(fingerprint(llama()), fingerprint(model)) or "")


ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=10000.0:"),
        ({"rope_parameters": ROPE}, "rope_parameters.rope_type=default: this one has linear"),
        ({"vocab_size": 120}, "vocab_size=97: this one has 120"),
        ({"intermediate_size": 128}, "intermediate_size=96: this one has 128"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=2: this one has 3"),
        ({"num_attention_heads": 8}, "num_attention_heads=4: this one has 8"),
        ({"attention_bias": True}, "attention_bias=False: this one has True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-06: this one has 1e-05"),
    ],
)
def test_another_setting_is_named(fields: dict[str, Any], told: str) -> None:
    config = FAMILIES["Llama"].config()
    config.update(fields)
    other = AutoModelForCausalLM.from_config(config)
    assert told in (difference(fingerprint(llama()), fingerprint(other)) or "")


def test_versions_of_transformers_may_state_different_settings() -> None:
    ours = fingerprint(llama())
    assert difference({**ours, "gone": 1}, {**ours, "new": 2}) is None


def test_quantized_weights_count() -> None:
    """Tensors of a library that are made of others: codes and scales, say."""
    model = llama()
    codes, scales = torch.zeros(4, 4), torch.ones(4, 4)
    model.lm_head.weight = nn.Parameter(TwoTensor(codes, scales), requires_grad=False)
    before = fingerprint(model)
    assert before == fingerprint(model)
    scales[1, 1] = 2
    assert difference(before, fingerprint(model)) == "made by a model with other weights"


def test_adapters_count() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert difference(fingerprint(llama()), fingerprint(model))


def test_what_has_no_weights_is_refused() -> None:
    with pytest.raises(TypeError, match="model is a LlamaConfig: expected the model, not its"):
        fingerprint(FAMILIES["Llama"].config())
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(FAMILIES["Llama"].config())
    with pytest.raises(ValueError, match="on the meta device: load the model's weights first"):
        fingerprint(model)
