"""The smallest config of any model class: its default config with every size shrunk.

Transformers' configs share most of their vocabulary, so one table of names serves nearly all of
them; ``tiny_overrides.py`` has what it does not. Per-layer lists keep one layer of each kind.
"""

from __future__ import annotations

import itertools
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 128, 4, 2, 32
VOCABULARY = 160
FIRST_SPECIAL_TOKEN = 120
"""Ids from here on mean images, audio and the like; prompts use the ones below."""
POSITIONS = 1024

_BY_SIZE = (
    (
        WIDTH,
        """
        hidden_size d_model n_embd embed_dim embedding_size intermediate_size d_ff ffn_dim
        ffn_hidden_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size mlp_dim dim
        expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size intermediate_size_mlp out_hidden_size projection_dim
        output_dim text_hidden_size encoder_hidden_size word_embed_proj_dim projector_hidden_size
        attention_hidden_size lru_width vision_output_dim cross_attention_hidden_size
        audio_hidden_size hidden_dim mlp_hidden_size
    """,
    ),
    (
        HEADS,
        """
        num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads encoder_num_attention_heads decoder_num_attention_heads
    """,
    ),
    (
        KV_HEADS,
        """
        num_key_value_heads num_kv_heads swa_num_key_value_heads decoder_num_key_value_heads
        encoder_num_key_value_heads num_global_key_value_heads
    """,
    ),
    (HEAD_DIM, "head_dim d_kv v_head_dim kv_channels swa_head_dim qk_head_dim index_head_dim"),
    # latent and indexed attention
    (32, "kv_lora_rank q_lora_rank mamba_head_dim mamba_d_head"),
    (
        16,
        """
        qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state
        ssm_state_size state_size hidden_size_per_layer_input num_mel_bins
    """,
    ),
    # experts, heads of linear attention
    (8, "mamba_num_heads mamba_n_heads"),
    (
        4,
        """
        num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads
        linear_num_value_heads num_query_tokens
    """,
    ),
    (
        2,
        """
        num_experts_per_tok moe_topk top_k_experts moe_k moe_top_k linear_num_key_heads mamba_expand
    """,
    ),
    (
        1,
        """
        n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts mamba_n_groups
        n_groups
    """,
    ),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        POSITIONS,
        """
        max_position_embeddings n_positions max_target_positions n_ctx max_seq_len
        max_sequence_length
    """,
    ),
    # windows: shorter than a prompt, so that they are felt
    (48, "sliding_window attention_chunk_size sliding_window_size"),
    (64, "mamba_chunk_size"),
)
_SIZES = {name: size for size, names in _BY_SIZE for name in names.split()} | {
    # one image of 4 x 4 patches, one sound of 40 frames
    "mm_tokens_per_image": 4,
    "max_source_positions": 20,
    "scale_factor": 2,
}
_LAYER_COUNTS = """
    num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
    num_encoder_layers depth encoder_num_hidden_layers decoder_num_hidden_layers
""".split()  # noqa: SIM905
_BOOKKEEPING = {"model_type", "architectures", "transformers_version", "dtype", "auto_map"}


def tiny_config(
    config_class: type[PreTrainedConfig], overrides: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """A small config of ``config_class``.

    Args:
        overrides: fields to set after shrinking, those of sub-configs as nested dicts.
    """
    return config_class(**merged(_shrunk(config_class()), overrides or {}))


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of ``config`` and its sub-configs, with the sizes of a tiny model."""
    special = itertools.count(FIRST_SPECIAL_TOKEN)
    return _shrunk_level(config, special)


def _shrunk_level(config: PreTrainedConfig, special: Any) -> dict[str, Any]:
    fields = {k: v for k, v in config.to_dict().items() if k not in _BOOKKEEPING}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = {"model_type": value.model_type, **_shrunk_level(value, special)}
    common_name = {theirs: ours for ours, theirs in config.attribute_map.items()}
    layers = _layers_to_keep(config)
    for name, value in fields.items():
        common = name if name in _SIZES else common_name.get(name, name)
        if isinstance(value, list) and len(value) == layers.start and layers.start > 1:
            fields[name] = [value[index] for index in layers.kept]
        elif name == "use_cache":
            fields[name] = True
        elif not isinstance(value, int) or isinstance(value, bool):
            continue
        elif common in _LAYER_COUNTS:
            fields[name] = len(layers.kept)
        elif name.endswith(("_token_id", "_token_index")) and value >= 3:
            fields[name] = next(special)
        elif common in _SIZES and value > 0:
            fields[name] = _SIZES[common]
    if "image_size" in fields and (patch := fields.get("patch_size")):
        side = 4 * (patch[0] if isinstance(patch, list) else patch)
        fields["image_size"] = [side, side] if isinstance(fields["image_size"], list) else side
    if "per_layer_config" in fields:  # by index of a layer: all are alike here
        fields["per_layer_config"] = {}
    if isinstance(fields.get("kv_lora_rank"), int):  # latent attention has one size of its own
        fields |= {"num_key_value_heads": HEADS, "head_dim": fields["qk_rope_head_dim"]}
    _shrink_rope(fields)
    return fields


class _Layers:
    """How many layers a config has, and which of them a tiny model keeps."""

    def __init__(self, start: int, kept: list[int]) -> None:
        self.start, self.kept = start, kept


def _layers_to_keep(config: PreTrainedConfig) -> _Layers:
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return _Layers(0, [0, 1])
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not isinstance(kinds, list) or len(kinds) != count:
        return _Layers(count, [0, min(1, count - 1)])
    kept = sorted({kinds.index(kind) for kind in kinds})
    return _Layers(count, kept if len(kept) > 1 else [0, min(1, count - 1)])


def _shrink_rope(fields: dict[str, Any]) -> None:
    """Fits what rotary embeddings say about single channels to the new head size."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        pairs = fields.get("qk_rope_head_dim") or fields.get("head_dim") or HEAD_DIM
        pairs = int(pairs * (parameters.get("partial_rotary_factor") or 1)) // 2
        if section := parameters.get("mrope_section"):
            share = [pairs * part // sum(section) for part in section]
            parameters["mrope_section"] = [pairs - sum(share[1:]), *share[1:]]
        for name in ("short_factor", "long_factor"):
            if name in parameters:
                parameters[name] = [1.0] * pairs


def merged(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``fields`` with those of ``overrides`` in their place, dicts within them likewise."""
    both = dict(fields)
    for name, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = merged(both[name], value) if nested else value
    return both
