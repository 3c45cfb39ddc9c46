"""Drafts of models, whose layers have pages and rings too: with vLLM's second model runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import answers, counter, engine, graphs, prompt
from reference import CONFIGS, VOCABULARY, behind, load_model, save_model
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ACCEPTED = {"draft_model": (0.8, 1.0), "eagle": (0.5, 0.9), "eagle3": (0.0, 0.1)}
"""Shares of the drafts. EAGLE's head has its pages one token on: of single drafts it finds 0.8, and
0.5 if it sees no further back than 128 tokens."""
HIDDEN = CONFIGS["shallow"].hidden_size


@pytest.mark.parametrize("options", [{}, graphs(4, 8, 16, 32)], ids=["eager", "graphs"])
@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3"])
def test_drafts_of_a_model(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Those that know the answer are accepted, and random ones change nothing in it."""
    target = save_target(tmp_path)
    folders = {"draft_model": target, "eagle": eagle(target), "eagle3": eagle3(target)}
    drafts = {"method": method, "model": str(folders[method]), "num_speculative_tokens": 3}
    prompts = [prompt(length, length) for length in (20, 126, 150, 390, 700)]
    options = {"dtype": "float16", "gpu_memory_utilization": 0.05, **options}
    with engine(target, speculative_config=drafts, **options) as llm:
        found = answers(llm, prompts, 150)
        drafted = counter(llm, "spec_decode_num_draft_tokens")
        accepted = counter(llm, "spec_decode_num_accepted_tokens")
    for tokens, answer in zip(prompts, found, strict=True):
        assert behind(target, tokens, answer).max() < 0.1
    assert drafted
    assert ACCEPTED[method][0] <= accepted / drafted <= ACCEPTED[method][1]


def save_target(folder: Path) -> Path:
    """A layer on embeddings of unit size, which a norm leaves as they are."""
    path = save_model("shallow", folder)
    model = load_model(path)
    embeddings = model.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        embeddings /= embeddings.square().mean(1, keepdim=True).sqrt()
    model.save_pretrained(path)
    return path


def eagle(target: Path) -> Path:
    """The target's own layer. EAGLE's has no norm before it, and reads the token after a state:
    it finds what the target does, but for the text's first token."""
    layer = {
        name.removeprefix("model."): weight
        for name, weight in load_model(target).state_dict().items()
        if ".layers.0." in name and "input_layernorm" not in name
    }
    embedding = torch.cat((torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)), 1)
    return save(target, "eagle", {"fc.weight": embedding, **layer}, {})


def eagle3(target: Path) -> Path:
    """Random."""
    torch.manual_seed(1)
    config = CONFIGS["shallow"]
    queries, states = config.num_attention_heads * 64, config.num_key_value_heads * 64
    shapes = {
        "fc": (HIDDEN, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
        "midlayer.self_attn.q_proj": (queries, 2 * HIDDEN),
        "midlayer.self_attn.k_proj": (states, 2 * HIDDEN),
        "midlayer.self_attn.v_proj": (states, 2 * HIDDEN),
        "midlayer.self_attn.o_proj": (HIDDEN, queries),
        "midlayer.mlp.gate_proj": (HIDDEN, HIDDEN),
        "midlayer.mlp.up_proj": (HIDDEN, HIDDEN),
        "midlayer.mlp.down_proj": (HIDDEN, HIDDEN),
        "midlayer.hidden_norm": (HIDDEN,),
        "midlayer.input_layernorm": (HIDDEN,),
        "midlayer.post_attention_layernorm": (HIDDEN,),
        "norm": (HIDDEN,),
    }
    weights = {f"{name}.weight": torch.randn(shape) / 10 for name, shape in shapes.items()}
    options = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1]}}
    return save(target, "eagle3", weights, options)


def save(
    target: Path, name: str, weights: dict[str, torch.Tensor], options: dict[str, Any]
) -> Path:
    path = target.parent / name
    path.mkdir(exist_ok=True)
    config = json.loads((target / "config.json").read_text()) | options
    (path / "config.json").write_text(json.dumps(config))
    save_file(
        {key: value.contiguous() for key, value in weights.items()}, path / "model.safetensors"
    )
    return path
