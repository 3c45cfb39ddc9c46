"""``torch.compile`` around a cache: the same results, and few compilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from oscar_kv import OscarCache
from oscar_kv.integrations.compile import compile_layers


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What Dynamo keeps belongs to the model's code, not to one model."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(layers: int, attention: str) -> tuple[Any, list[Any]]:
    """A model, and the graphs that are compiled as it runs: by a backend that leaves them be."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=layers,
        intermediate_size=128,
        vocab_size=300,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(attention)
    compile_layers(model, backend=backend)
    return model, graphs


@torch.no_grad()
def logits(model: Any, batch: int, length: int, steps: int = 5) -> Tensor:
    """Of ``steps`` single tokens after a prompt of ``length``."""
    cache = OscarCache(model.config)
    ids = torch.arange(batch * (length + steps)).view(batch, -1) % 300
    model(ids[:, :length], past_key_values=cache)
    following = ids[:, length:].split(1, 1)
    return torch.cat([model(step, past_key_values=cache).logits for step in following], 1)


@pytest.mark.parametrize("attention", ["oscar", "sdpa"])
def test_the_same_logits(attention: str) -> None:
    """Over prompts and steps, one of which completes a page."""
    model, graphs = compiled(2, attention)
    for batch, length in [(1, 253), (2, 20)]:
        with torch.compiler.set_stance("force_eager"):
            expected = logits(model, batch, length)
        assert (logits(model, batch, length) - expected).abs().max() <= 1e-4
    assert graphs


def test_layers_and_batches_share_what_is_compiled() -> None:
    counts = []
    for layers in (1, 12):  # Dynamo compiles one function eight times at most
        torch.compiler.reset()
        model, graphs = compiled(layers, "oscar")
        for batch in (2, 1, 3):
            logits(model, batch, length=1, steps=1)
        counts.append(len(graphs))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (1, 4):
                logits(model, batch, length=1)
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_generating_and_going_on_after_a_rollback() -> None:
    """Two turns over one cache, resident or offloaded; of the first answer most is cut away."""
    model, graphs = compiled(3, "oscar")
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    prompt = torch.arange(500).view(2, -1) % 300

    def turns(offloading: bool) -> list[Any]:
        cache = OscarCache(model.config, offloading=offloading)
        options = {"past_key_values": cache, "max_new_tokens": 8}
        first = model.generate(prompt, **options)
        cache.crop(-5)
        ids = torch.cat([first[:, : cache.get_seq_length()], prompt[:, :9]], 1)
        second = model.generate(ids, **options)
        assert [packed.pages_per_sequence for packed in cache.packed_layers()] == [[1, 1]] * 3
        return [first.tolist(), second.tolist()]

    with torch.compiler.set_stance("force_eager"):
        expected = turns(offloading=False)
    assert not graphs
    for offloading in (False, True):
        assert turns(offloading) == expected
    assert graphs
