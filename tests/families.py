"""Tiny random models, one per family: the attention variants that a cache must survive.

Weights are drawn wider than usual, so that attention is far from uniform and a wrong key shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import oscar_kv.integrations.transformers  # noqa: F401  (registers the attention)

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.13,
    "tie_word_embeddings": False,  # else some models just repeat their input
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family, and what to expect of it.

    Attributes:
        name: of the model, and of its ``...Config`` class in Transformers.
        overrides: config fields besides the common ones.
        layers: one letter per cache layer: ``q`` quantized, ``.`` left to Transformers.
        dense: the attention implementation to compare with.
        has_recurrence: linear or convolutional layers, whose state sees padding and cannot be
            rolled back.
        adjust: changes the model once it is built.
        multimodal: for a model that reads more than text, the config fields beside those of its
            text model.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    layers: str = "qq"
    dense: str = "sdpa"
    has_recurrence: bool = False
    adjust: Callable[[Any], None] | None = None
    multimodal: dict[str, Any] | None = None

    @property
    def quantized(self) -> list[int]:
        """Indices of the layers that are quantized."""
        return [index for index, letter in enumerate(self.layers) if letter == "q"]

    def config(self) -> Any:
        """A fresh config; skips the test where this Transformers does not have the family."""
        config_class = getattr(transformers, f"{self.name}Config", None)
        if config_class is None:
            pytest.skip(f"transformers {transformers.__version__} has no {self.name}")
        fields = {**_COMMON, **self.overrides}
        if self.multimodal is not None:
            fields = {"text_config": fields, **self.multimodal}
        return config_class(**fields)

    def model(self, implementation: str) -> Any:
        """The model, always with the same weights, attending by ``implementation``."""
        model = _model(self.name)
        model.set_attn_implementation(implementation)
        if self.multimodal is not None:
            model.model.rope_deltas = None  # what Qwen-VL remembers of the last prompt
        return model


# Two wide heads over one KV head: for families that derive head_dim from the hidden size.
_WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
_HYBRID = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def _spread_sinks(model: Any) -> None:
    """Attention-sink logits that matter beside those of tokens."""
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(2.0)


_FAMILIES = (
    Family("Llama"),
    Family("Qwen2"),
    Family("Qwen3"),
    Family("Mistral", {"sliding_window": None}),
    Family("Phi3"),
    # Soft-capped logits and a query scale of its own.
    Family(
        "Gemma2",
        {**_HYBRID, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
        layers=".q",
        dense="eager",
    ),
    Family("Gemma3Text", {**_HYBRID, "query_pre_attn_scalar": 24}, layers=".q"),
    Family("GptOss", {**_HYBRID, **_EXPERTS}, layers=".q", dense="eager", adjust=_spread_sinks),
    Family("Mixtral", {**_EXPERTS, "sliding_window": None}),
    Family("Qwen3Moe", _EXPERTS),
    Family("GPTNeoX", _WIDE_HEADS),
    Family(
        "Qwen3Next",
        {
            **_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
        },
        layers=".q",
        has_recurrence=True,
    ),
    Family(
        "Lfm2",
        {**_WIDE_HEADS, "layer_types": ["conv", "full_attention"]},
        layers=".q",
        has_recurrence=True,
    ),
    Family("Olmo2", _WIDE_HEADS),
    Family("Cohere", {**_WIDE_HEADS, "logit_scale": 1.0}),
    Family("Cohere2", {**_HYBRID, "logit_scale": 1.0}, layers=".q"),
    Family("StableLm", _WIDE_HEADS),  # partial rotary
    Family("Glm4"),
    # Multi-head latent attention: the cache holds latents and rotary keys of unequal widths.
    Family(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    Family("Granite", {**_WIDE_HEADS, "attention_multiplier": 32**-0.5}),
    Family("SmolLM3", {"no_rope_layers": [1, 0]}),
    Family("Exaone4", _HYBRID, layers=".q"),
    Family("GPT2", {"n_embd": 64, "n_head": 2, "n_layer": 2}),
    Family(
        "Llama4Text",
        {
            **_EXPERTS,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        layers=".q",
    ),
    # The last two layers read the keys and values of the first two.
    Family(
        "Gemma4Text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 48,
            "num_kv_shared_layers": 2,
            "global_head_dim": 64,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
        layers=".q..",
    ),
    Family(
        "Qwen2_5_VL",
        {
            **_WIDE_HEADS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            },
        },
        multimodal={
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [0],
            },
            "image_token_id": 1,
            "video_token_id": 1,
            "vision_start_token_id": 1,
            "vision_end_token_id": 1,
        },
    ),
)

FAMILIES = {family.name: family for family in _FAMILIES}


def each_family(*names: str) -> pytest.MarkDecorator:
    """Parametrizes a test by ``family``: those named, or all."""
    chosen = [FAMILIES[name] for name in names] or list(FAMILIES.values())
    return pytest.mark.parametrize("family", chosen, ids=[family.name for family in chosen])


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids ``[batch, length]`` without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def left_padded(ids: Tensor, paddings: list[int]) -> tuple[Tensor, Tensor]:
    """``ids`` with the first ``paddings[b]`` tokens of each row blanked, and the padding mask."""
    mask = torch.arange(ids.shape[1]) >= torch.tensor(paddings)[:, None]
    return ids * mask, mask.long()


@torch.no_grad()
def teacher_forced(
    model: Any, ids: Tensor, chunks: list[int], cache: Any, mask: Tensor | None = None
) -> Tensor:
    """Logits ``[B, T, vocabulary]`` of ``ids``, fed in ``chunks`` that sum to ``T``."""
    assert sum(chunks) == ids.shape[1]
    logits, end = [], 0
    for chunk in chunks:
        begin, end = end, end + chunk
        inputs: dict[str, Tensor] = {"input_ids": ids[:, begin:end]}
        if mask is not None:
            positions = (mask[:, :end].cumsum(-1) - 1).clamp_min(0)
            positions = positions[:, begin:]
            if hasattr(model.config, "vision_config"):
                positions = positions.expand(3, -1, -1)  # time, height, width
            inputs |= {"attention_mask": mask[:, :end], "position_ids": positions}
        logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def page_counts(cache: Any) -> list[int]:
    """Pages of the first sequence, for each quantized layer that holds tokens."""
    packed = [getattr(layer, "packed", None) for layer in cache.layers]
    return [p.pages_per_sequence[0] for p in packed if p is not None]


@functools.cache
def _model(name: str) -> Any:
    family = FAMILIES[name]
    config = family.config()
    torch.manual_seed(1)
    if family.multimodal is None:
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    model.eval()
    if family.adjust is not None:
        family.adjust(model)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model
