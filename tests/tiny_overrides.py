"""What the general rule of ``tiny_config.py`` gets wrong, by model class."""

from __future__ import annotations

from typing import Any

from tiny_config import HEAD_DIM, VOCABULARY, WIDTH


def _mrope(*section: int) -> dict[str, Any]:
    """Rotary positions in time, height and width, with as many channel pairs each."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}


_MROPE = {"rope_parameters": _mrope(4, 6, 6)}
_HALF_MROPE = {"rope_parameters": {**_mrope(2, 3, 3), "partial_rotary_factor": 0.5}}
_HEAD_DIM = {"head_dim": HEAD_DIM}
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_SOFT_GRANITE = {"attention_multiplier": HEAD_DIM**-0.5}  # 1 by default: attention to one token
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32}
_GEMMA_3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [WIDTH] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "num_kv_shared_layers": 2,
}
_COMPASS = {
    "rope_parameters": {
        "full_attention": _mrope(4, 6, 6),
        "sliding_attention": _mrope(4, 6, 6),
    }
}
_QWEN_4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "rope_parameters": {"partial_rotary_factor": 0.25},
}
_QWEN_OMNI_THINKER = {
    "vision_start_token_id": VOCABULARY - 2,
    "audio_start_token_id": VOCABULARY - 1,
    "text_config": _MROPE,
}
_SPEECH_CODES = VOCABULARY + 1024  # a talker never says the last 1,024

OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {**_MAMBA, "attn_layer_indices": [1]},
    "Blip2ForConditionalGeneration": {"image_token_index": 130},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 120}},
    "CodeGenForCausalLM": {"rotary_dim": 16},
    "CohereCompassForCausalLM": _COMPASS,
    "CohereCompassForConditionalGeneration": {"text_config": _COMPASS},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DoryForCausalLM": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", *["full_attention"] * 3],
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "Dots1ForCausalLM": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 120}},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": {"rope_parameters": _mrope(6, 6, 4)}},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32},
    "GPTJForCausalLM": {"rotary_dim": 16},
    "Gemma3nForCausalLM": _GEMMA_3N,
    "Glm46VForConditionalGeneration": {"text_config": _MROPE},
    "Glm4vForConditionalGeneration": {"text_config": _MROPE},
    "Glm4vMoeForConditionalGeneration": {"text_config": _HALF_MROPE},
    "GlmOcrForConditionalGeneration": {"text_config": _MROPE},
    "GraniteForCausalLM": _SOFT_GRANITE,
    "GraniteMoeForCausalLM": _SOFT_GRANITE,
    "GraniteMoeHybridForCausalLM": {**_MAMBA, **_HYBRID, **_SOFT_GRANITE},
    "GraniteMoeSWAForCausalLM": _SOFT_GRANITE,
    "GraniteMoeSharedForCausalLM": _SOFT_GRANITE,
    "GraniteSWAForCausalLM": _SOFT_GRANITE,
    "HrmTextForCausalLM": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "HunYuanDenseV1ForCausalLM": _HEAD_DIM,
    "HunYuanMoEV1ForCausalLM": _HEAD_DIM,
    "HunYuanVLForConditionalGeneration": {
        "text_config": {**_HEAD_DIM, "rope_parameters": {"xdrope_section": [4, 4, 4, 4]}}
    },
    "Idefics2ForConditionalGeneration": {"text_config": {"sliding_window": None}},
    "InstructBlipForConditionalGeneration": {"image_token_index": 130},
    "JambaForCausalLM": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LlavaOnevisionForConditionalGeneration": {"image_grid_pinpoints": [[56, 56]]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MinistralForCausalLM": {
        **_HEAD_DIM,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Mistral4ForCausalLM": {
        "qk_rope_head_dim": 16,
        "rope_parameters": {"partial_rotary_factor": 1.0},
    },
    "MistralForCausalLM": {"sliding_window": None},
    "MllamaForCausalLM": {"cross_attention_layers": [1]},
    "MllamaForConditionalGeneration": {"text_config": {"cross_attention_layers": [1]}},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "MoonshineForConditionalGeneration": {
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "NemotronForCausalLM": {**_HEAD_DIM, "num_key_value_heads": 2},
    "PaddleOCRVLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen2VLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen2_5OmniForConditionalGeneration": {
        "thinker_config": _QWEN_OMNI_THINKER,
        "talker_config": {**_MROPE, "embedding_size": WIDTH},
        "token2wav_config": {
            "dit_config": {
                "num_embeds": VOCABULARY,
                "emb_dim": 32,
                "enc_emb_dim": 32,
                "enc_dim": 32,
                "enc_channels": [32, 32, 32, 32, 96],
                "look_ahead_layers": [0],
                "look_backward_layers": [0],
            },
            "bigvgan_config": {"upsample_initial_channel": 64},
        },
    },
    "Qwen2_5OmniThinkerForConditionalGeneration": _QWEN_OMNI_THINKER,
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen4ExpForCausalLM": _QWEN_4,
    "Qwen4ExpForConditionalGeneration": {"text_config": _QWEN_4},
    "Qwen3OmniMoeForConditionalGeneration": {
        "thinker_config": _QWEN_OMNI_THINKER,
        "talker_config": {
            "text_config": {
                **_MROPE,
                "vocab_size": _SPEECH_CODES,
                "shared_expert_intermediate_size": WIDTH,
            },
            "code_predictor_config": {"num_code_groups": 4},
            "num_code_groups": 4,
            "thinker_hidden_size": WIDTH,
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
            "speaker_id": {"ethan": 3},
            "codec_eos_token_id": 4,
            "codec_nothink_id": 5,
            "codec_think_bos_id": 6,
            "codec_think_eos_id": 7,
            "codec_pad_id": 8,
            "codec_bos_id": 9,
        },
        "code2wav_config": {
            "decoder_dim": 64,
            "num_quantizers": 4,
            "codebook_size": _SPEECH_CODES,
        },
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": _QWEN_OMNI_THINKER,
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds": False},
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 48}},
    "VoxtralForConditionalGeneration": {
        "audio_token_id": 130,
        "audio_config": {"intermediate_size": 4 * WIDTH},
    },
    "XLNetLMHeadModel": {"d_head": HEAD_DIM, "d_inner": WIDTH},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"mamba_headdim": 32, "n_mamba_heads": 8},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}

NOT_BUILT = {
    "BltForCausalLM": "its patcher and hash tables have sizes of their own",
    "VibeVoiceForConditionalGeneration": "needs diffusers",
}
