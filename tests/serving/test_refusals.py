"""What the backend does not do, it says before it serves anything, in one line."""
# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine import engine
from reference import save_model


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sliding", {}, "OSCAR_KV attention backend does not support sliding-window layers"),
        ("llama", {"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers"),
        ("llama", {"kv_cache_dtype": "fp8"}, "does not support --kv-cache-dtype fp8"),
        ("llama", {"block_size": 64}, "--block-size 64: OSCAR_KV has pages of 128 tokens"),
        (
            "llama",
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "does not support KV connectors",
        ),
        ("llama", {"attention_backend": "OSCAR_KV_TINY"}, "Unknown attention backend"),
    ],
)
def test_refused(family: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=message),
        engine(save_model(family, tmp_path), **options),
    ):
        pass


def test_drafts_of_a_model_are_refused(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    drafts = {"method": "draft_model", "model": str(path), "num_speculative_tokens": 3}
    with (
        pytest.raises(
            ValueError, match="does not support drafts by draft_model with this model runner"
        ),
        engine(path, speculative_config=drafts),
    ):
        pass


def test_nothing_changes_for_who_does_not_ask(tmp_path: Path) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with engine(save_model("llama", tmp_path), attention_backend=None) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert {layer.get_attn_backend() for layer in layers.values()} == {CPUAttentionBackend}
