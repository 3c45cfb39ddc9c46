"""Which layers a pass reaches: models that are not what their config says, passes that fail."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import LinearAttentionLayer

from oscar_kv import OscarCache, OscarConfig, save_cache

EXACT = OscarConfig(recent_tokens=512)
LAYERS = 4


def config(layers: int = LAYERS) -> LlamaConfig:
    fields = FAMILIES["Llama"].config().to_dict()
    return LlamaConfig.from_dict({**fields, "num_hidden_layers": layers})


def llama(implementation: str = "oscar", layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config(layers)).eval()
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = 0
    return model


class Identity(torch.nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class LeftOut(torch.nn.Module):
    """A decoder layer that is there and not called."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def cut_off(count: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers = model.model.layers[:count]

    return change


def replaced(*indices: int, by: Callable[[Any], torch.nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for index in indices:
            model.model.layers[index] = by(model.model.layers[index])

    return change


CHANGES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda model: None,
    "last layer cut off": cut_off(3),
    "all but one cut off": cut_off(1),
    **{
        f"{name} {indices}": replaced(*indices, by=by)
        for name, by in (("replaced", lambda layer: Identity()), ("left out", LeftOut))
        for indices in ((0,), (1,), (3,), (1, 3), (2, 3), (0, 1, 2))
    },
}


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["oscar", "sdpa"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_without_some_of_its_layers(change: str, implementation: str) -> None:
    model = llama(implementation)
    CHANGES[change](model)
    ids = tokens(2, 60)
    wanted = model(ids, use_cache=False).logits
    # Without its first layer no cache knows how long it is, nor what a mask must cover.
    chunks = [40, *[1] * 20] if change.endswith(("(0,)", "(0, 1, 2)")) else [40, 1, 1, 9, 9]
    positions = torch.arange(60)[None].split(chunks, 1)
    lengths = []
    caches: list[Any] = [OscarCache(model.config, EXACT), DynamicCache(config=model.config)]
    for cache in caches:
        found = [
            model(part, position_ids=position, past_key_values=cache).logits
            for part, position in zip(ids.split(chunks, 1), positions)
        ]
        assert (torch.cat(found, 1) - wanted).abs().max() < 1e-4
        lengths.append([cache.get_seq_length(), *(x.get_seq_length() for x in cache.layers)])
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("implementation", ["oscar", "sdpa"])
def test_generate_with_the_config_of_a_larger_model(implementation: str) -> None:
    model, ids = llama(implementation, layers=3), tokens(2, 60)
    said = [
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False).tolist()
        for cache in (DynamicCache(config=model.config), OscarCache(config(), EXACT))
    ]
    assert said[0] == said[1]


@torch.no_grad()
def test_the_config_of_a_smaller_model_is_named() -> None:
    model = llama()
    with pytest.raises(IndexError, match=r"layer 3: this cache was made for 3 layers"):
        model(tokens(1, 20), past_key_values=OscarCache(config(3)))


def filled_by_hand(order: list[tuple[int, int, int]]) -> Any:
    """A cache given tokens ``begin:end`` of layer ``index``, in this order."""
    cache = OscarCache(config(), EXACT)
    for index, begin, end in order:
        states = torch.randn(1, 2, 90, 32, generator=torch.Generator().manual_seed(index))
        cache.update(states[:, :, begin:end], states[:, :, begin:end] + 1, index)
    return cache


ORDERS = {
    "layer after layer": [(i, 0, 90) for i in range(LAYERS)],
    "last layer first": [(i, 0, 90) for i in reversed(range(LAYERS))],
    "all parts of a layer": [(i, b, b + 30) for i in range(LAYERS) for b in (0, 30, 60)],
    "first layers ahead": [
        *((i, begin, begin + 45) for begin in (0, 45) for i in (0, 1)),
        *((i, 0, 90) for i in (2, 3)),
    ],
    "one token at a time": [(i, b, b + 1) for b in range(90) for i in range(LAYERS)],
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_cache_filled_by_hand(order: str) -> None:
    cache = filled_by_hand(ORDERS[order])
    for index, layer in enumerate(cache.layers):
        states = torch.randn(1, 2, 90, 32, generator=torch.Generator().manual_seed(index))
        assert cache.get_seq_length(index) == 90
        assert torch.equal(layer.keys.clone(), states)
        assert torch.equal(layer.values.clone(), states + 1)


@torch.no_grad()
def test_layers_left_out_of_one_pass_only() -> None:
    """Their keys are missing from then on: the next pass over them has no right answer."""
    model, ids = llama(), tokens(1, 40)
    cache = OscarCache(model.config, EXACT)
    model(ids, past_key_values=cache)
    layer = model.model.layers[1]
    model.model.layers[1] = Identity()
    model(ids[:, :1], past_key_values=cache)
    model.model.layers[1] = layer
    for _ in range(2):
        with pytest.raises(ValueError, match=r"reset\(\) first"):
            model(ids[:, :1], past_key_values=cache)
    cache.reset()
    wanted = model(ids, use_cache=False).logits
    assert (model(ids, past_key_values=cache).logits - wanted).abs().max() < 1e-4


# -- passes that fail --------------------------------------------------------------------------


def fail(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("injected")


HYBRIDS = ["Gemma3Text", "GptOss", "Qwen3Next", "Lfm2", "Gemma4Text", "Llama4Text"]


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_failed_pass_in_a_hybrid_is_noticed(
    name: str, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between layers of which none is quantized, or all are linear."""
    if name == "Lfm2" and new == 1 and not hasattr(DynamicCache, "get_conv_state"):
        pytest.skip("this Transformers changes the state of a convolution unseen")
    model: Any = copy.deepcopy(FAMILIES[name].model("oscar"))
    ids = tokens(1, 70)
    layers = [i for i, kind in enumerate(FAMILIES[name].layers) if kind != "."] + [0]
    for failing in range(max(layers)):
        cache = OscarCache(model.config, EXACT)
        model(ids[:, : 70 - new], past_key_values=cache)
        with monkeypatch.context() as patch:
            parts = dict(model.model.layers[failing].named_children())
            part = next(n for n in ("mlp", "feed_forward") if n in parts)
            patch.setattr(parts[part], "forward", fail)
            with pytest.raises(torch.OutOfMemoryError):
                model(ids[:, -new:], past_key_values=cache)
        assert cache.get_seq_length() == 70 - new
        for _ in range(2):
            with pytest.raises(ValueError, match=r"call reset\(\) first"):
                model(ids[:, -new:], past_key_values=cache)
        cache.reset()
        wanted = model(ids, use_cache=False).logits
        assert (model(ids, past_key_values=cache).logits - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_a_failed_pass_is_taken_back_before_the_cache_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = llama(), tokens(2, 60)
    changes: dict[str, Callable[[OscarCache], None]] = {
        "crop": lambda cache: cache.crop(-3),
        "crop(0)": lambda cache: cache.crop(0),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([True, False])),
    }
    for change in changes.values():
        caches: list[Any] = [OscarCache(model.config, EXACT) for _ in range(2)]
        failed, untouched = caches
        for cache in (failed, untouched):
            model(ids[:, :50], past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[2].mlp, "forward", fail)
            with pytest.raises(torch.OutOfMemoryError):
                model(ids[:, 50:], past_key_values=failed)
        for cache in (failed, untouched):
            change(cache)
        assert [layer.get_seq_length() for layer in failed.layers] == [
            layer.get_seq_length() for layer in untouched.layers
        ]
        for one, other in zip(failed.layers, untouched.layers):
            assert torch.equal(one.keys.clone(), other.keys.clone())


def lengths_of(cache: Any) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def given(cache: OscarCache, index: int, new: int, poison: bool = False) -> None:
    states = torch.randn(1, 2, new, 32, generator=torch.Generator().manual_seed(index))
    cache.update(states * torch.nan if poison else states, states, index)


def test_layers_of_different_lengths_keep_what_they_held() -> None:
    """A refused update takes back its own pass in each layer, and nothing else."""
    for lengths in ([10, 20, 20, 20], [20, 10, 20, 20]):
        cache = OscarCache(config(), EXACT)
        for index, length in enumerate(lengths):
            given(cache, index, length)
        given(cache, 0, 1)
        with pytest.raises(ValueError, match="NaN, Inf"):
            given(cache, 1, 1, poison=True)
        assert lengths_of(cache) == lengths


def test_room_is_reserved_and_counted_after_whole_passes_only() -> None:
    """As a CUDA graph asks: it decodes from one length in all layers."""
    cache = OscarCache(config(), EXACT)
    for index in range(LAYERS):
        given(cache, index, 10)
    for ahead in (lambda: cache.reserve(5), lambda: cache.advance(0)):
        given(cache, 0, 1)
        given(cache, 1, 1)
        ahead()
        assert lengths_of(cache) == [10] * LAYERS


def test_a_change_interrupted_between_layers_asks_for_a_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where lengths would not tell: an order of sequences."""
    for method, argument in (("reorder_cache", torch.tensor([1, 0])), ("crop", -3)):
        model, ids = llama(), tokens(2, 40)
        cache: Any = OscarCache(model.config, EXACT)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        name = {"reorder_cache": "select", "crop": "crop"}[method]
        with monkeypatch.context() as patch:
            patch.setattr(cache.layers[2].packed, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                getattr(cache, method)(argument)
        with pytest.raises(ValueError, match=r"reset\(\) first"):
            model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=r"reset\(\) first"):
            cache.crop(-1)
        cache.reset()
        with torch.no_grad():
            model(ids, past_key_values=cache)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_states_of_one_layer_belong_to_one_pass() -> None:
    """A layer of linear attention may have several."""
    cache = OscarCache(FAMILIES["Lfm2"].config(), EXACT)
    cache.layers[0] = LinearAttentionLayer(number_of_states=2)
    states = torch.randn(1, 1, 1, 32)
    for _ in range(3):
        for number in range(2):
            cache.update_conv_state(torch.randn(1, 64, 3), 0, state_idx=number)
        cache.update(states, states, 1)
    assert cache.get_seq_length(1) == 3


def test_a_torn_cache_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = copy.deepcopy(FAMILIES["Gemma3Text"].model("oscar"))
    cache, ids = OscarCache(model.config, EXACT), tokens(1, 60)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        monkeypatch.setattr(model.model.layers[0].mlp, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"reset\(\) first"):
        save_cache(cache, tmp_path / "torn.safetensors", model)
    assert not list(tmp_path.iterdir())


# -- threads -----------------------------------------------------------------------------------


def in_new_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@torch.no_grad()
@pytest.mark.parametrize("fate", ["dead", "idle in a pool", "busy with another cache"])
def test_another_thread_goes_on_after_a_pass_that_failed(
    fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama(), tokens(1, 300)
    cache, untouched = (OscarCache(model.config) for _ in range(2))
    for one in (cache, untouched):
        in_new_thread(lambda one=one: model(ids[:, :200], past_key_values=one))
    turn = torch.no_grad()(lambda: model(ids[:, 200:], past_key_values=cache).logits)
    with ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", fail)
            with pytest.raises(torch.OutOfMemoryError):
                (in_new_thread if fate == "dead" else lambda f: pool.submit(f).result())(turn)
        go_on = threading.Event()
        if fate == "busy with another cache":
            other, begun = copy.deepcopy(model), threading.Event()
            forward = other.model.layers[1].mlp.forward

            def waiting(hidden: Tensor) -> Tensor:
                begun.set()
                go_on.wait()
                return forward(hidden)

            monkeypatch.setattr(other.model.layers[1].mlp, "forward", waiting)
            pool.submit(other, ids, past_key_values=OscarCache(model.config))
            begun.wait()
        try:
            found = in_new_thread(turn)
        finally:
            go_on.set()
    assert torch.equal(found, model(ids[:, 200:], past_key_values=untouched).logits)
