"""Models whose layers lie on several devices: a layer's pages are where its states come from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import FAMILIES, teacher_forced, tokens
from torch import Tensor
from transformers import LlamaConfig

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.integrations import graph
from oscar_kv.integrations.graph import DecodeGraph

Places = dict[str, str | int | torch.device]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def weights_on_cpu(model: Any, folder: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def weights_on_disk(model: Any, folder: Path) -> None:
    places: Places = dict.fromkeys(("model.layers.0", "lm_head"), "disk")
    for name in ("model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm"):
        places[name] = "cpu"
    dispatch_model(model, places, main_device=torch.device("cpu"), offload_dir=str(folder))


@pytest.mark.parametrize("place", [weights_on_cpu, weights_on_disk])
@pytest.mark.parametrize("attention", ["oscar", "sdpa"])
@pytest.mark.parametrize("offloading", [False, True])
def test_layers_whose_weights_come_and_go(
    place: Callable[[Any, Path], None], attention: str, offloading: bool, tmp_path: Path
) -> None:
    """Hooks of Accelerate around every module; between calls a module's weights have no data."""
    plain = FAMILIES["Llama"].model(attention)
    model = copy.deepcopy(plain)
    place(model, tmp_path)
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    ids, chunks = tokens(2, 520), [300, 1, 5, 208, 6]
    cache = OscarCache(model.config, offloading=offloading)
    found = teacher_forced(model, ids, chunks, cache)
    assert torch.equal(found, teacher_forced(plain, ids, chunks, OscarCache(plain.config)))
    assert [packed.device.type for packed in cache.packed_layers()] == ["cpu", "cpu"]
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 2}
    made = [
        each.generate(
            ids, past_key_values=OscarCache(each.config, offloading=offloading), **options
        )
        for each in (model, plain)
    ]
    assert made[0].tolist() == made[1].tolist()


# -- one layer at a time, the "meta" device as another one ------------------------------------


def states(device: str, length: int = 100) -> tuple[Tensor, Tensor]:
    """Random keys and values ``[1, 2, length, 32]``."""
    keys, values = torch.randn(2, 1, 2, length, 32)
    return keys.to(device), values.to(device)


def two_layers(**options: Any) -> OscarCache:
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    return OscarCache(config, OscarConfig(check_finite=False), **options)


@pytest.mark.parametrize("offloading", [False, True])
def test_a_layer_stays_where_its_first_states_were(offloading: bool) -> None:
    cache = two_layers(offloading=offloading)
    for layer, device in enumerate(("cpu", "meta")):
        cache.update(*states(device), layer)
    assert [packed.device.type for packed in cache.packed_layers()] == ["cpu", "meta"]
    assert [packed.pool.data.device.type for packed in cache.packed_layers()] == ["cpu", "meta"]
    if cache.staging is not None:
        assert [device.type for device in cache.staging] == ["cpu", "meta"]
    cache.reorder_cache(torch.tensor([0, 0]))  # type: ignore[arg-type]
    assert [packed.batch_size for packed in cache.packed_layers()] == [2, 2]
    cache.crop(-10)
    assert cache.get_seq_length() == 90


@pytest.mark.parametrize("offloading", [False, True])
def test_a_layer_that_moves_raises_and_loses_nothing(offloading: bool) -> None:
    cache, expected = two_layers(offloading=offloading), two_layers()
    prompt, (keys, values) = states("cpu", 400), states("cpu", 200)
    for each in (cache, expected):
        for layer in range(2):
            each.update(*prompt, layer)
    cache.update(keys, values, 0)
    with pytest.raises(ValueError, match="keys are on meta: this cache is on cpu"):
        cache.update(keys.to("meta"), values.to("meta"), 1)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [400, 400]
    for layer in range(2):
        for each in (cache, expected):
            each.update(keys, values, layer)
    # In the first layer what was new is taken back, and what it had packed of the tail is not.
    one, other = cache.packed_layers()[1], expected.packed_layers()[1]
    for part, wanted in zip(one.dense(), other.dense()):
        assert torch.equal(part, wanted)
    cache.reset()
    cache.update(*states("meta"), 0)
    layer: Any = cache.layers[0]
    assert layer.packed.device.type == "meta"


def test_a_graph_needs_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "require_cuda", lambda device: None)
    model = FAMILIES["Llama"].model("oscar")
    cache, ids = OscarCache(model.config), tokens(1, 10)
    model(ids, past_key_values=cache)
    last: Any = cache.layers[-1]
    last.packed = last.packed.to("meta")
    with pytest.raises(ValueError, match="layers are on cpu and meta"):
        DecodeGraph(model, cache)(ids[:, -1:])


# -- on GPUs ---------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("offloading", [False, True])
def test_layers_on_a_gpu_and_a_cpu(offloading: bool) -> None:
    plain = FAMILIES["Llama"].model("oscar")
    model = copy.deepcopy(plain).to("cuda:0")
    last = model.model.layers[1].to("cpu")
    hook = AlignDevicesHook("cpu", io_same_device=True, skip_keys="past_key_values")
    add_hook_to_module(last, hook)
    ids, chunks = tokens(2, 520), [300, 1, 5, 208, 6]
    cache = OscarCache(model.config, offloading=offloading)
    found = teacher_forced(model, ids.to("cuda:0"), chunks, cache).cpu()
    assert [str(packed.device) for packed in cache.packed_layers()] == ["cuda:0", "cpu"]
    wanted = teacher_forced(plain, ids, chunks, OscarCache(plain.config))
    assert torch.linalg.vector_norm(found - wanted) <= 0.05 * wanted.norm()
    if not offloading:
        with pytest.raises(ValueError, match="all of them on one device"):
            DecodeGraph(model, cache)(ids[:, -1:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("offloading", [False, True])
def test_layers_on_two_gpus(offloading: bool) -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar")).to("cuda:0")
    ids, chunks = tokens(2, 520).to("cuda:0"), [300, 1, 5, 208, 6]
    wanted = teacher_forced(model, ids, chunks, OscarCache(model.config))
    first, second = ("model.embed_tokens", "model.rotary_emb"), ("model.norm", "lm_head")
    places: Places = dict.fromkeys((*first, "model.layers.0"), 0)
    places |= dict.fromkeys((*second, "model.layers.1"), 1)
    dispatch_model(model, places)
    cache = OscarCache(model.config, offloading=offloading)
    found = teacher_forced(model, ids, chunks, cache)
    assert [packed.device.index for packed in cache.packed_layers()] == [0, 1]
    assert torch.equal(found.to("cuda:0"), wanted)
