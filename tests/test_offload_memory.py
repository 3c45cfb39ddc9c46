"""Where offloaded pages are: what a cache has on the device and in CPU memory, and until when."""

from __future__ import annotations

import copy
import weakref

import offload_pairs
import pytest
import torch
from families import tokens
from offload_pairs import HEAD_DIM, HEADS, LAYERS, llama, packed_kv, pair, pools
from states import states
from transformers import AutoModelForCausalLM

from oscar_kv import OscarCache
from oscar_kv.storage.offload import OffloadedPool, Staging

_poison = offload_pairs.poison  # a fixture of every test here


@torch.no_grad()
def test_memory_is_told_apart() -> None:
    model = llama()
    offloaded, resident = pair(model)
    assert offloaded.nbytes == offloaded.host_nbytes == 0
    for cache in (offloaded, resident):
        model(tokens(2, 3000), past_key_values=cache)
    kinds, others = offloaded.memory(), resident.memory()
    for kind in ("codes", "metadata", "norms", "padding", "tail", "tables"):
        assert kinds[kind] == others[kind]
    assert resident.host_nbytes == 0
    pool = pools(offloaded)[0]
    pages = pool.used * 2 * pool.layout.page_bytes
    assert pages * LAYERS <= offloaded.host_nbytes <= (pages + 20_000) * LAYERS
    assert 2 * pages <= kinds["staging"] <= 2.5 * pages
    assert offloaded.nbytes == sum(kinds.values())
    assert sum(kinds[kind] for kind in ("codes", "metadata", "norms", "padding")) == pages * LAYERS


@torch.no_grad()
def test_forgotten_pages_are_freed_at_once() -> None:
    model = llama()
    cache = OscarCache(model.config, offloading=True)
    model(tokens(1, 700), past_key_values=cache)
    kept = [weakref.ref(pool) for pool in pools(cache)]
    cache.reset()
    assert cache.host_nbytes == 0
    assert [pool() for pool in kept] == [None] * LAYERS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pages_are_in_pinned_memory_and_copies_of_them_too() -> None:
    packed = packed_kv(Staging("cuda"), device="cuda")
    keys, values = states("gaussian", 2, HEADS, 500, HEAD_DIM)
    packed.append(keys.cuda(), values.cuda())
    for batch in (packed, copy.deepcopy(packed)):
        assert isinstance(batch.pool, OffloadedPool)
        assert batch.pool._chunks
        assert all(chunk.is_pinned() for chunk in batch.pool._chunks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_the_device_holds_two_layers() -> None:
    """The pages of eight layers; what is freed with a copy under way is not handed out early."""
    config = copy.deepcopy(llama().config)
    config.num_hidden_layers = 8
    model = AutoModelForCausalLM.from_config(config).eval().cuda()
    model.set_attn_implementation("oscar")
    ids = tokens(4, 3000).cuda()
    used, pages = [], 0
    for cache in pair(model):
        before = torch.cuda.memory_allocated()
        model(ids, past_key_values=cache, logits_to_keep=1)
        model(ids[:, :1], past_key_values=cache)
        used.append(torch.cuda.memory_allocated() - before)
        pages = sum(pool.used * HEADS * pool.layout.page_bytes for pool in pools(cache))
    assert used[0] <= used[1] - 5 / 8 * pages
