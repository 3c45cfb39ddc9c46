"""Offloaded pages beside resident ones, where whatever is not copied reads as NaN.

New CPU memory and a buffer that changes hands are filled with 255, which is no number in FP8 and
float16. Layers are more than there are buffers.
"""

from __future__ import annotations

from functools import cache as once
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.storage import offload
from oscar_kv.storage.offload import OffloadedPool, Staging
from oscar_kv.storage.packed import PackedKV

LAYERS = 4
HEADS, HEAD_DIM = 2, 16
"""Of :func:`packed_kv`."""


@pytest.fixture(autouse=True, scope="module")
def poison() -> Any:
    """Fills memory that holds nothing yet, and has chunks of a few pages."""
    new_chunk, load_into = OffloadedPool._new_chunk, OffloadedPool.load_into

    def load_into_poisoned(pool: OffloadedPool, data: Tensor) -> None:
        load_into(pool, data.fill_(255))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadedPool, "_new_chunk", lambda pool: new_chunk(pool).fill_(255))
        patch.setattr(OffloadedPool, "load_into", load_into_poisoned)
        patch.setattr(offload, "_CHUNK_BYTES", 20_000)
        yield


@once
def llama(device: str = "cpu") -> Any:
    """A tiny model of four layers, with the weights of the test's seed."""
    config = FAMILIES["Llama"].config()
    config.num_hidden_layers = LAYERS
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config).eval().to(device)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("oscar")
    return model


def pair(model: Any, config: OscarConfig | None = None) -> tuple[OscarCache, OscarCache]:
    """An offloaded cache and a resident one."""
    offloaded, resident = (
        OscarCache(model.config, config, offloading=offloading) for offloading in (True, False)
    )
    return offloaded, resident


def pools(cache: OscarCache) -> list[Any]:
    return [packed.pool for packed in cache.packed_layers()]


def packed_kv(staging: Staging | None, **more: Any) -> PackedKV:
    shape = {"batch_size": 2, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}
    config = OscarConfig(recent_tokens=0, key_group=128)
    return PackedKV(config, **shape, staging=staging, **more)
