"""What the CUDA build of vLLM asks of a backend, as far as it can be asked without a GPU.

``make test-vllm`` puts the package, which is only unpacked, in front of the engine's that runs.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.config.cache import is_known_kv_cache_dtype
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.kv_cache_planning import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
    get_kv_quant_mode,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

import oscar_kv
from oscar_kv import OscarConfig
from oscar_kv.integrations.vllm.attention import other_heads
from oscar_kv.integrations.vllm.plugin import BACKENDS
from oscar_kv.integrations.vllm.recent import RecentCache, RecentManager
from oscar_kv.storage.layout import PageLayout

MODEL = Path(oscar_kv.__file__).parent / "models" / "demo"
PRESETS = {
    "OSCAR_KV": OscarConfig.compact(),
    "OSCAR_KV_QUALITY": OscarConfig.quality(),
    "OSCAR_KV_HIGH": OscarConfig.high(),
}


@pytest.fixture(autouse=True, scope="module")
def _plugins() -> None:
    load_general_plugins()


def backend(name: str = "OSCAR_KV") -> Any:
    return AttentionBackendEnum[name].get_class()


def full_attention() -> FullAttentionSpec:
    """One layer of Llama-3.1-8B."""
    return FullAttentionSpec(
        block_size=128,
        num_kv_heads=8,
        head_size=128,
        dtype=STR_DTYPE_TO_TORCH_DTYPE["oscar_kv"],
        kv_quant_mode=get_kv_quant_mode("oscar_kv"),
    )


def test_version() -> None:
    assert vllm.__version__ == "0.33.0"


def test_the_cache_dtype_is_known() -> None:
    assert is_known_kv_cache_dtype("oscar_kv")
    assert STR_DTYPE_TO_TORCH_DTYPE["oscar_kv"] == torch.uint8


@pytest.mark.parametrize("name", BACKENDS)
def test_names_and_pages(name: str) -> None:
    chosen = backend(name)
    assert chosen.get_name() == name
    assert pickle.loads(pickle.dumps(AttentionBackendEnum[name])) is AttentionBackendEnum[name]
    spec = chosen.customize_spec(full_attention())
    assert spec.page_size_bytes == 8 * PageLayout(PRESETS[name], 128, 8).page_bytes


def test_other_backends_still_travel() -> None:
    member = AttentionBackendEnum.FLASH_ATTN
    assert pickle.loads(pickle.dumps(member)) is member


def test_options_of_the_command_line() -> None:
    arguments = EngineArgs(
        str(MODEL), attention_backend="OSCAR_KV", kv_cache_dtype="oscar_kv", block_size=128
    )
    config = arguments.create_engine_config()
    assert config.attention_config.backend is AttentionBackendEnum["OSCAR_KV"]
    assert config.cache_config.cache_dtype == "oscar_kv"


@pytest.mark.parametrize(
    ("changed", "differ"),
    [({}, False), ({"head_dim": 32}, True), ({"num_key_value_heads": 1}, True)],
)
def test_drafts_with_other_heads_are_told(
    changed: dict[str, int], differ: bool, tmp_path: Path
) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    drafts = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    options = {"skip_tokenizer_init": True, "speculative_config": drafts}
    engine = EngineArgs(str(MODEL), **options).create_engine_config()
    assert other_heads(engine.speculative_config) is differ


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, []),
        ({"block_size": None}, []),
        ({"kv_cache_dtype": "auto"}, []),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype not supported"]),
        ({"has_sliding_window": True}, ["sliding window not supported"]),
        ({"has_sink": True}, ["attention sinks not supported"]),
        ({"use_kv_connector": True}, ["KV connector not supported"]),
        ({"use_mla": True}, ["MLA not supported"]),
        ({"use_dcp": True}, ["DCP not supported"]),
        ({"head_size": 72}, ["head_size not supported"]),
        ({"block_size": 64}, ["block_size not supported"]),
    ],
)
def test_what_the_selector_hears(changed: dict[str, Any], problem: list[str]) -> None:
    asked = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "oscar_kv",
        "block_size": 128,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": AttentionType.DECODER,
    }
    assert backend().validate_configuration(**(asked | changed)) == problem


def test_a_sliding_window_has_no_pages() -> None:
    spec = SlidingWindowSpec(
        block_size=128, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, sliding_window=512
    )
    with pytest.raises(ValueError, match="full attention only: a layer asks for a SlidingWindow"):
        backend().customize_spec(spec)


def test_pages_and_exact_tokens_share_one_pool() -> None:
    """The scheduler of this version gives every request its pages and its ring."""
    config = EngineArgs(str(MODEL), max_model_len=2048).create_engine_config()
    config.cache_config.block_size = 128
    config.cache_config.kv_cache_layout = KVCacheLayout.LBHNC.name
    pages = backend().customize_spec(full_attention())
    recent = RecentCache(
        "layer",
        num_kv_heads=8,
        head_dim=128,
        value_dim=128,
        dtype=torch.bfloat16,
        page_bytes=pages.page_size_bytes,
        drafts=3,
    )
    assert (recent.spec.block_size, recent.spec.blocks_per_request) == (16, 9)
    specs: dict[str, Any] = {f"model.layers.{i}.attn": pages for i in range(32)}
    specs |= {f"model.layers.{i}.attn.recent": recent.spec for i in range(32)}
    groups = get_kv_cache_groups(config, specs)
    assert [len(group.layer_names) for group in groups] == [32, 32]
    found = get_kv_cache_config_from_groups(config, groups, available_memory=1 << 30)
    assert found.num_blocks == (1 << 30) // (32 * pages.page_size_bytes)
    managers = [KVCacheSpecRegistry.get_manager_class(g.kv_cache_spec) for g in groups]
    assert managers == [FullAttentionManager, RecentManager]
