"""Decode steps as a CUDA graph: the same as eager steps, and nothing that waits for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicLayer

from oscar_kv import OscarCache, OscarConfig, decode_attention, generation
from oscar_kv.generation import can_be_captured, continuation, decode_graph
from oscar_kv.integrations.compile import compile_layers
from oscar_kv.integrations.graph import DecodeGraph
from oscar_kv.kernels.triton_page import high_planes, plane
from oscar_kv.storage.layout import PageLayout

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HIGH = OscarConfig.high()
CONFIG = LlamaConfig(
    hidden_size=256,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=2,
    intermediate_size=256,
    vocab_size=300,
)


def tiny_model(device: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval().to(device)
    model.set_attn_implementation("oscar")
    return model


def test_what_cannot_be_captured_is_refused() -> None:
    model = tiny_model("cpu")
    cache = OscarCache(CONFIG)
    assert not can_be_captured(model, cache)
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device"):
        DecodeGraph(model, cache)
    with pytest.raises(ValueError, match="run the prompt first"):
        cache.reserve(10)
    with pytest.raises(ValueError, match="max_tokens=0"):
        OscarCache(CONFIG, max_tokens=0)


def test_each_layer_needs_kernels_for_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own config and its own heads, not those of other layers."""
    wide = LlamaConfig(**{**CONFIG.to_dict(), "head_dim": 128})
    layers = [(DynamicLayer(), config) for config in (CONFIG, wide)]
    monkeypatch.setattr(generation, "cache_layers", lambda config: layers)
    asked = set()

    def kernels(layout: PageLayout, device: torch.device) -> None:
        asked.add((layout.config, layout.head_dim))
        if (layout.config, layout.head_dim) == (HIGH, 64):
            raise ValueError("no kernel")

    monkeypatch.setattr(generation, "require_kernels", kernels)
    model = SimpleNamespace(
        device=torch.device("cuda"), config=SimpleNamespace(_attn_implementation="oscar")
    )
    assert can_be_captured(model, OscarCache(CONFIG, layers={1: HIGH}))
    assert asked == {(OscarConfig(), 64), (HIGH, 128)}
    assert not can_be_captured(model, OscarCache(CONFIG, layers={0: HIGH}))


@needs_gpu
@pytest.mark.parametrize(
    ("preset", "layers"),
    [("compact", {}), ("paper", {}), ("compact", {1: HIGH})],
    ids=["compact", "paper", "mixed"],
)
@torch.no_grad()
def test_replayed_steps_equal_eager_ones(preset: str, layers: dict[int, OscarConfig]) -> None:
    """Over more than a page of steps, a ragged left-padded batch."""
    model = tiny_model("cuda")
    ids = torch.randint(0, 300, (2, 150 if preset == "compact" else 20), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    steps = torch.randint(0, 300, (150, 2, 1), device="cuda")
    eager, captured = (
        OscarCache(CONFIG, OscarConfig.preset(preset), layers=layers) for _ in range(2)
    )
    for cache in (eager, captured):
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    captured.reserve(150)
    graph = DecodeGraph(model, captured, starts=torch.tensor([0, 7]))
    for number, step in enumerate(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        wanted = model(
            step,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=eager,
        ).logits[:, -1]
        found = graph(step)
        assert torch.linalg.vector_norm(found - wanted) <= 5e-3 * wanted.norm(), number
    graph.require_finite()
    for one, other in zip(captured.packed_layers(), eager.packed_layers()):
        assert one.lengths == other.lengths
        assert one.page_counts.tolist() == other.page_counts.tolist()
        assert one.tail_lengths.tolist() == other.tail_lengths.tolist()

    def run_out() -> None:
        for _ in range(300):
            graph(steps[0])

    with pytest.raises(ValueError, match="are reserved"):
        run_out()


@needs_gpu
@torch.no_grad()
def test_compiled_layers_are_captured() -> None:
    """Compiled in the first step, also where the prompt was not."""
    model = tiny_model("cuda")
    compile_layers(model)
    steps = torch.randint(0, 300, (5, 1, 1), device="cuda")
    eager, captured = OscarCache(CONFIG), OscarCache(CONFIG)
    with torch.compiler.set_stance("force_eager"):
        for cache in (eager, captured):
            model(torch.ones(1, 253, dtype=torch.long, device="cuda"), past_key_values=cache)
        expected = [model(step, past_key_values=eager).logits[:, -1] for step in steps]
    captured.reserve(len(steps))
    graph = DecodeGraph(model, captured)
    for step, wanted in zip(steps, expected):
        assert torch.linalg.vector_norm(graph(step) - wanted) <= 5e-3 * wanted.norm()


@needs_gpu
def test_continuation_is_the_same_with_a_graph() -> None:
    model = tiny_model("cuda")
    prompt = torch.randint(0, 300, (1, 200), device="cuda")
    texts = []
    for wanted in (False, True):
        cache = OscarCache(CONFIG)
        graph = decode_graph(model, cache, wanted)
        texts.append([t.id for t in continuation(model, prompt, cache, 100, graph=graph)])
    assert texts[0][:20] == texts[1][:20]  # later a tie may fall the other way
    assert len(texts[1]) == len(texts[0])


@needs_gpu
@torch.no_grad()
def test_nonfinite_states_are_reported() -> None:
    model = tiny_model("cuda")
    cache = OscarCache(CONFIG)
    model(torch.zeros(1, 150, dtype=torch.long, device="cuda"), past_key_values=cache)
    cache.reserve(10)
    graph = DecodeGraph(model, cache)
    one = torch.ones(1, 1, dtype=torch.long, device="cuda")
    graph(one)
    graph.require_finite()
    model.model.embed_tokens.weight[1] = torch.nan
    graph(one)
    with pytest.raises(ValueError, match="held NaN or Inf"):
        graph.require_finite()


@needs_gpu
@torch.no_grad()
def test_no_step_waits_for_the_device() -> None:
    # of one layer: updates of the first of several would each begin a pass anew
    config = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 1})
    cache = OscarCache(config, OscarConfig(check_finite=False))
    prompt = torch.randn(2, 2, 300, 64, device="cuda")
    cache.update(prompt, prompt, 0)
    query, new = torch.randn(2, 8, 1, 64, device="cuda"), prompt[:, :, :1]
    layer: Any = cache.layers[0]
    cache.update(new, new, 0)
    decode_attention(query, layer.packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(140):  # a page is completed on the way
            cache.update(new, new, 0)
            decode_attention(query, layer.packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.packed.pages_per_sequence == [2, 2]


@triton.jit
def _products(words, right, out, p: tl.constexpr):
    row, column = tl.arange(0, 16), tl.arange(0, 8)
    low = tl.load(words + tl.program_id(0) * 256 + row[:, None] * 16 + row[None, :])
    factor = tl.load(right + row[:, None] * 8 + column[None, :])
    found = tl.dot(plane(low, high_planes(low), p), factor)
    tl.store(out + tl.program_id(0) * 128 + row[:, None] * 8 + column[None, :], found)


@needs_gpu
def test_a_masked_code_is_an_exact_number_to_the_matrix_unit() -> None:
    """Every word, every plane: subnormal float16 operands are not flushed to zero."""
    words = torch.arange(65536, device="cuda").view(256, 16, 16)
    right = torch.randn(16, 8, device="cuda").half()
    for p in range(8):
        out = torch.full((256, 16, 8), torch.nan, device="cuda")
        _products[(256,)](words.to(torch.int16), right, out, p)
        codes = (words >> (2 * p) & 3).double() * 4 ** (p % 4) * 2.0**-24
        torch.testing.assert_close(out.double(), codes @ right.double(), rtol=1e-5, atol=1e-12)
