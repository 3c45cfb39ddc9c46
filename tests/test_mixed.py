"""Two methods in one cache, and which layers get the better one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache, LlamaConfig

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.demo import MODEL
from oscar_kv.evaluation import runner
from oscar_kv.evaluation.cache import MethodCache, MethodLayer, bits_of, contender, describe
from oscar_kv.evaluation.fit import fitting
from oscar_kv.evaluation.methods import FP8, METHODS, Ablation, Method, method
from oscar_kv.evaluation.mixed import Mixed
from oscar_kv.evaluation.sensitivity import layer_sensitivity
from oscar_kv.evaluation.subject import Subject, rows_of_array
from oscar_kv.evaluation.suites import SUITES
from oscar_kv.evaluation.tasks import task
from oscar_kv.evaluation.teacher import fill, forced, kl_divergence, read_prompt


@pytest.fixture(scope="module")
def subject() -> Subject:
    rows = rows_of_array(f"{MODEL / 'heldout.npz'}:text")[:6, :512]
    return Subject(MODEL, rows, dtype="float32", device="cpu")


def unknown(one: Method) -> list[float]:
    raise AssertionError("nobody should ask")


def test_the_layers_that_suffer_most_get_the_better_method() -> None:
    asked: list[Method] = []

    def sensitivity(one: Method) -> list[float]:
        asked.append(one)
        return [0.1, 0.4, 0.2, 0.3]

    mixed = Mixed.called("mixed:base=kivi:group=64,better=fp8,layers=2,recent_tokens=64")
    assert mixed is not None
    assert mixed.choose(4, sensitivity) == (1, 3)
    assert asked == [method("kivi:group=64,recent_tokens=64")]
    assert mixed.methods[1] == FP8(recent_tokens=64)
    assert dataclasses.replace(mixed, layers=(3, 0)).choose(4, unknown) == (0, 3)
    assert dataclasses.replace(mixed, layers=0).choose(4, sensitivity) == ()
    for layers in (5, -1, (4,)):
        with pytest.raises(ValueError, match="4 full-attention layers"):
            dataclasses.replace(mixed, layers=layers).choose(4, sensitivity)
    assert Mixed.called("kivi") is None


def test_bits_are_those_of_both(subject: Subject) -> None:
    """In two of eight layers 8 bits, 16 of a window and 4.25 in the others."""
    config = subject.model.config
    name = "mixed:base=int4,better=fp8,layers=[0,5],recent_tokens=100"
    one = contender(name, config, tuple, unknown)
    assert one.better_layers == (0, 5)
    cache: Any = one.make_cache()
    assert [isinstance(layer.method, FP8) for layer in cache.layers] == [
        index in (0, 5) for index in range(8)
    ]
    prompt = DynamicCache(config=config)
    read_prompt(subject.model, subject.rows[:1, :300], prompt)
    list(forced(subject.model, subject.rows[:1, :401], fill(cache, prompt), 300, 100))
    # the middle of the last step is at 350: 250 tokens are quantized
    quantized = (2 * 8 + 6 * 4.25) / 8
    assert bits_of(cache).quantized == pytest.approx(quantized)
    assert bits_of(cache).all == pytest.approx((250 * quantized + 100 * 16) / 350)


def test_two_presets_are_what_the_real_cache_stores(subject: Subject) -> None:
    """The same states, the last hundred one by one, are read back the same, bit for bit."""
    config = subject.model.config
    prompt = DynamicCache(config=config)
    read_prompt(subject.model, subject.rows[:1, :400], prompt)
    name = "mixed:base=compact,better=high,layers=[0,5]"
    mixed: Any = contender(name, config, tuple, unknown).make_cache()
    high = OscarConfig.high()
    real = OscarCache(config, OscarConfig.compact(), layers={0: high, 5: high})
    exact: list[Any] = prompt.layers
    for begin, end in [(0, 300), *((token, token + 1) for token in range(300, 400))]:
        for index, layer in enumerate(exact):
            keys, values = layer.keys[:, :, begin:end], layer.values[:, :, begin:end]
            for cache in (mixed, real):
                cache.update(keys, values, index)
    for layer, packed in zip(mixed.layers, real.packed_layers(), strict=True):
        assert layer.quantized == 256
        for found, expected in zip((layer.keys, layer.values), packed.dense(), strict=True):
            assert torch.equal(found, expected)
    assert bits_of(mixed) == pytest.approx(bits_of(real))


def test_sensitivity_is_the_divergence_with_one_layer_quantized(subject: Subject) -> None:
    model, tokens = subject.model, subject.rows[:2, :300]
    config = model.config
    coarse = method("quarot")
    found = layer_sensitivity(model, tokens, coarse)
    assert len(found) == 8
    assert all(divergence > 1e-5 for divergence in found)
    assert layer_sensitivity(model, tokens, Ablation(recent_tokens=1000)) == [0] * 8
    # layer 3 once more, by hand
    prompt = DynamicCache(config=config)
    read_prompt(model, tokens[:, :150], prompt)
    cache: Any = DynamicCache(config=config)
    cache.layers[3] = MethodLayer(coarse)
    logits = [
        torch.cat([logits for logits, _ in forced(model, tokens, fill(one, prompt), 150, 128)], 1)
        for one in (DynamicCache(config=config), cache)
    ]
    assert found[3] == pytest.approx(float(kl_divergence(*logits).mean()), rel=1e-4)
    exact = MethodCache(config, [None])
    assert not any(isinstance(layer, MethodLayer) for layer in exact.layers)


def test_a_suite_leaves_out_what_a_model_cannot_have() -> None:
    config = AutoConfig.from_pretrained(MODEL)
    one_layer = AutoConfig.from_pretrained(MODEL, num_hidden_layers=1)
    for suite in ("peers", "ablation"):
        assert fitting(SUITES[suite], config) == (list(SUITES[suite]), [])
        few, wrong = fitting(SUITES[suite], one_layer)
        assert "mixed:layers=[0,1]" not in few
        assert [name for name in SUITES[suite] if not name.startswith("mixed")] == [
            name for name in few if not name.startswith("mixed")
        ]
        assert all("the model has 1 full-attention layers" in why for why in wrong)
    assert "mixed:layers=1" in fitting(SUITES["ablation"], one_layer)[0]


def test_a_suite_leaves_out_groups_that_do_not_divide_a_head() -> None:
    odd = LlamaConfig(hidden_size=160, num_attention_heads=2, head_dim=80, num_hidden_layers=2)
    fit, wrong = fitting(["full", "kivi", "kivi:group=16", "int4", "mixed:base=kivi"], odd)
    assert fit == ["full", "kivi:group=16", "int4"]
    assert len(wrong) == 2
    for why in wrong:
        assert (
            "cannot quantize 2 KV heads of 80 channels: group=32: expected a divisor of 80" in why
        )


def test_rows_say_which_layers_were_chosen(subject: Subject) -> None:
    one = task("perplexity:windows=1,length=256,prefix=128")
    names = ["mixed:base=compact,better=high,layers=1,recent_tokens=0", "compact"]
    plans = runner.plan(subject, [one], names, 0, set())
    mixed, plain = runner.run(subject, plans, 0)
    ranked = subject.sensitivity(method("compact:recent_tokens=0"))
    assert mixed["better_layers"] == (max(range(8), key=lambda layer: ranked[layer]),)
    assert "better_layers" not in plain
    assert json.loads(json.dumps(mixed["method"]))["better"]["config"]["key_bits"] == 4


def test_mistakes() -> None:
    for name, message in {
        "mixed:base=nobody": "expected one of",
        "mixed:better=oscar-eigen": "expected methods without calibration",
        "mixed:base=2": "base=2: expected the name of a method",
        "mixed:better=[1]": r"better=\(1,\): expected the name of a method",
        "mixed:layers=many": "layers='many': expected how many, or which",
        "mixed:layers=1.5": "layers=1.5: expected how many, or which",
        "mixed:layers=true": "layers=True: expected how many, or which",
        "mixed:layers=[0,x]": "expected how many, or which",
        "mixed:layers=[0,1.0]": r"layers=\(0, 1.0\): expected how many, or which",
        "mixed:layer=2": r"unknown parameters \['layer'\]",
        "mixed@cache": "only the presets have a cache of their own",
    }.items():
        with pytest.raises(ValueError, match=message):
            describe(name)
    assert "mixed" not in METHODS


def test_the_text_of_the_ranking_is_not_scored(subject: Subject, tmp_path: Path) -> None:
    rows = rows_of_array(f"{MODEL / 'heldout.npz'}:text")[:6, :512]
    assert torch.equal(subject.rows, rows[:2])
    expected = layer_sensitivity(subject.model, rows[2:], method("kivi"))
    assert subject.sensitivity(method("kivi")) == expected
