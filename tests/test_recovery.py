"""After a failure of any kind a cache is what it was before, to the last bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from states import states
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from oscar_kv import OscarCache, OscarConfig, PackedKV, quantize
from oscar_kv.kernels import append, triton_backend

LAYERS = 3
BEFORE = 383
"""Tokens in a cache before a pass that fails: one more completes a page, in every preset."""
PASSES = {"a step": 1, "a chunk": 9, "a long chunk": 300}


@functools.cache
def model() -> Any:
    config = LlamaConfig.from_dict(
        {**FAMILIES["Llama"].config().to_dict(), "num_hidden_layers": LAYERS}
    )
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(config).eval()
    made.set_attn_implementation("oscar")
    return made


def fail(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("injected")


def logits(ids: Tensor, cache: OscarCache) -> Tensor:
    return model()(ids, past_key_values=cache).logits


def assert_go_on_alike(cache: OscarCache, untouched: OscarCache, lengths: list[int]) -> None:
    """Both give the same logits, to the last bit, and hold the same pages."""
    for seed, length in enumerate(lengths):
        ids = tokens(2, length, seed=seed)
        assert torch.equal(logits(ids, cache), logits(ids, untouched))
    for one, other in zip(cache.packed_layers(), untouched.packed_layers()):
        assert one.lengths == other.lengths
        assert one.pages_per_sequence == other.pages_per_sequence
        assert one.pool.used == other.pool.used


@torch.no_grad()
@pytest.mark.parametrize("preset", ["compact", "paper"])
@pytest.mark.parametrize("length", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_pass_that_fails_anywhere_leaves_no_trace(
    layer: int, part: str, length: int, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after a layer has stored the new tokens, whatever pages these complete; what comes
    next need not be what has failed."""
    cache, untouched = (OscarCache(model().config, OscarConfig.preset(preset)) for _ in range(2))
    for one in (cache, untouched):
        logits(tokens(2, BEFORE), one)
    with monkeypatch.context() as patch:
        patch.setattr(model().model.layers[layer].get_submodule(part), "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            logits(tokens(2, length, seed=7), cache)
    if layer == LAYERS - 1 and part != "self_attn.k_proj":
        # All layers have stored the tokens: nobody but the caller knows that the pass has failed.
        assert cache.get_seq_length() == BEFORE + length
        cache.crop(-length)
    assert cache.get_seq_length() == BEFORE
    assert_go_on_alike(cache, untouched, [3, 1, 200])


@torch.no_grad()
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_first_prompt_that_fails_asks_for_a_reset(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a pass has come to its end, it might be a model without the layers that are missing."""
    cache = OscarCache(model().config)
    with monkeypatch.context() as patch:
        patch.setattr(model().model.layers[layer].self_attn.k_proj, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            logits(tokens(2, 400), cache)
    for _ in range(2 * (layer > 0)):
        with pytest.raises(ValueError, match=r"reset\(\) first"):
            logits(tokens(2, 400), cache)
    cache.reset()
    assert_go_on_alike(cache, OscarCache(model().config), [300, 1])


@torch.no_grad()
def test_generate_goes_on_after_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller has the tokens so far, and the cache those that were read."""
    ids, cache = tokens(1, 380), OscarCache(model().config)
    forward, lengths = model().model.layers[1].mlp.forward, []

    def seventh_step(hidden: Tensor) -> Tensor:
        lengths.append(hidden.shape[1])
        return fail() if len(lengths) == 8 else forward(hidden)

    class Said:
        """A streamer that keeps every token it is given."""

        def __init__(self) -> None:
            self.tokens: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.tokens.append(value.reshape(1, -1))

        def end(self) -> None: ...

    streamer = Said()
    arguments: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with monkeypatch.context() as patch:
        patch.setattr(model().model.layers[1].mlp, "forward", seventh_step)
        with pytest.raises(torch.OutOfMemoryError):
            model().generate(
                ids, past_key_values=cache, max_new_tokens=20, streamer=streamer, **arguments
            )
    said = torch.cat(streamer.tokens, 1)
    assert said.shape[1] == cache.get_seq_length() + 1 == 380 + 7
    rest = model().generate(said, past_key_values=cache, max_new_tokens=13, **arguments)
    untouched = OscarCache(model().config)
    whole = model().generate(ids, past_key_values=untouched, max_new_tokens=20, **arguments)
    assert rest.tolist() == whole.tolist()


# -- one layer -------------------------------------------------------------------------------

KEYS, VALUES = states("gaussian", 3, 2, 700, 32)


def part(begin: int, end: int) -> tuple[Tensor, Tensor]:
    return KEYS[:, :, begin:end], VALUES[:, :, begin:end]


@pytest.mark.parametrize(
    "goes_on",
    [lambda packed: append(packed, *part(520, 521)), lambda packed: packed.reserve(1)],
    ids=["append", "reserve"],
)
def test_what_an_undo_needs_is_counted_and_goes_once_decoding_goes_on(
    goes_on: Callable[[PackedKV], None],
) -> None:
    packed = quantize(*part(0, 255))
    append(packed, *part(255, 256))
    assert packed.memory()["undo"] == 0  # a crop stays within the recent window
    append(packed, *part(256, 520))
    tail = 2 * 3 * 2 * 128 * 32 * 4  # keys and values of 3 x 2 heads, 128 tokens, float32
    assert packed.memory()["undo"] == tail
    assert packed.nbytes == quantize(*part(0, 520)).nbytes + tail
    goes_on(packed)
    assert packed.memory()["undo"] == 0


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_taking_back_the_latest_append_is_exact(preset: str) -> None:
    """Also of sequences of different lengths, with sinks; an earlier state is cropped as usual."""
    config = OscarConfig(**{**OscarConfig.preset(preset).to_dict(), "sink_tokens": 4})
    packed, untouched = (quantize(*part(0, 300), config, lengths=[300, 2, 131]) for _ in range(2))
    append(packed, *part(300, 600), lengths=[300, 290, 0])
    packed.crop([300, 2, 131])
    for one in (packed, untouched):
        append(one, *part(600, 690))
    assert packed.pages_per_sequence == untouched.pages_per_sequence
    assert packed.pool.used == untouched.pool.used
    for found, expected in zip(packed.dense(), untouched.dense()):
        assert torch.equal(found, expected)
    packed.crop([300, 2, 131])
    packed.crop([299, 2, 131])
    assert packed.lengths == [299, 2, 131]


@pytest.mark.parametrize("tail", [127, 255])
def test_a_kernel_that_fails_while_it_appends_changes_nothing(
    tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this token completes a page, so that one is set aside already."""
    monkeypatch.setenv("OSCAR_KV_BACKEND", "triton")
    packed, untouched = (quantize(*part(0, tail)) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend.triton_append, "append", fail)
        with pytest.raises(torch.OutOfMemoryError):
            append(packed, *part(tail, tail + 1))
    assert packed.lengths == [tail] * 3
    for one in (packed, untouched):
        append(one, *part(tail, tail + 1))
        append(one, *part(tail + 1, tail + 9))
    assert packed.pages_per_sequence == untouched.pages_per_sequence
    assert packed.memory() == untouched.memory()
    for found, expected in zip(packed.dense(), untouched.dense()):
        assert torch.equal(found, expected)


# -- bad input -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("length", [0, 300])
def test_unchecked_poison_in_one_sequence_leaves_the_others_alone(
    poison: float, length: int
) -> None:
    clean, cache = (OscarCache(model().config, OscarConfig(check_finite=False)) for _ in range(2))
    embed = model().get_input_embeddings()
    for one in (clean, cache):
        if length:
            logits(tokens(3, length), one)
        hidden = embed(tokens(3, 270, seed=1))
        if one is cache:
            hidden[1, 200] = poison
        model()(inputs_embeds=hidden, past_key_values=one)
    for seed, new in enumerate((1, 140, 1)):
        found, expected = (logits(tokens(3, new, seed=seed), one) for one in (cache, clean))
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert not torch.equal(found[1], expected[1])


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Any, Any]], str]] = {
    "keys without a head dimension": (lambda k, v: (k[:, 0], v), r"keys of shape \(2, 5, 32\)"),
    "values without a head dimension": (lambda k, v: (k, v[:, 0]), r"values of shape \(2, 5, 32\)"),
    "fewer values than keys": (lambda k, v: (k, v[:, :, 1:]), r"values of shape \(2, 2, 4, 32\)"),
    "fewer value heads": (lambda k, v: (k, v[:, :1]), r"values of shape \(2, 1, 5, 32\)"),
    "integers": (lambda k, v: (k.long(), v.long()), r"torch\.int64"),
    "float64": (lambda k, v: (k.double(), v.double()), r"torch\.float64"),
    "wider values": (lambda k, v: (k, v.double()), r"torch\.float64"),
    "values elsewhere": (lambda k, v: (k, v.to("meta")), "values are on meta"),
}


@pytest.mark.parametrize("length", [0, 300])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_states_are_named(wrong: str, length: int) -> None:
    caches = [OscarCache(model().config) for _ in range(2)]
    for layer in range(LAYERS * bool(length)):
        for cache in caches:
            cache.update(KEYS[:2, :, :length], VALUES[:2, :, :length], layer)
    change, message = WRONG[wrong]
    new = KEYS[:2, :, 300:305], VALUES[:2, :, 300:305]
    with pytest.raises((ValueError, TypeError), match=message):
        caches[0].update(*change(*new), 0)
    assert [caches[0].get_seq_length(layer) for layer in range(LAYERS)] == [length] * LAYERS
    for layer in range(LAYERS):
        found, expected = (cache.update(*new, layer) for cache in caches)
        for one, other in zip(found, expected):
            assert torch.equal(one, other)


def test_a_copy_and_its_original_go_their_own_ways() -> None:
    """Although they share pages: the original writes over some that only the copy still holds."""
    packed = quantize(*part(0, 520))
    with torch.inference_mode():
        twin, idle = copy.deepcopy(packed), copy.deepcopy(packed)
    before = packed.dense()
    packed.crop(200)
    append(packed, *part(0, 320))
    append(twin, *part(520, 700))
    assert len({one.pool.data.data_ptr() for one in (packed, twin, idle)}) == 3
    expected = quantize(*part(0, 520))
    for found, exact in zip(idle.dense(), before):
        assert torch.equal(found, exact)
    append(expected, *part(520, 700))
    for found, exact in zip(twin.dense(), expected.dense()):
        assert torch.equal(found, exact)
