"""One CUDA graph for a cache that is also used without it, turn after turn of a conversation.

Where there is no GPU, a graph is emulated: what would be replayed runs, its kernel (in Triton's
interpreter) appends by lengths on the device alone, and all memory is where it was when captured.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from oscar_kv import OscarCache, generation
from oscar_kv.chat import Conversation
from oscar_kv.demo import MODEL
from oscar_kv.generation import Loaded, load, quiet
from oscar_kv.integrations import graph as graph_module
from oscar_kv.integrations.graph import DecodeGraph
from oscar_kv.kernels import reference, triton_backend
from oscar_kv.storage.packed import PackedKV

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Counted(DecodeGraph):
    """A graph that counts how often it was captured."""

    captures = 0

    def _capture(self) -> torch.cuda.CUDAGraph:
        self.captures += 1
        return super()._capture()


class Emulated(DecodeGraph):
    """The same without a GPU."""

    captures = 0

    def _warm_up(self) -> Tensor:
        return self._step()

    def _capture(self) -> Any:
        self.captures += 1
        captured = [(packed.places, packed.most_pages) for packed in self.cache.packed_layers()]

        def replay() -> None:
            for packed, (places, most_pages) in zip(self.cache.packed_layers(), captured):
                assert packed.places == places
                assert packed.most_pages <= most_pages
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PackedKV, "append_step", _append_on_the_device)
                self._logits = self._step()

        return SimpleNamespace(replay=replay)


def _append_on_the_device(
    packed: PackedKV, keys: Tensor, values: Tensor, step: Any, *, lengths: Any = None
) -> tuple[Tensor, Tensor]:
    step(packed, keys, values, None)
    return keys, values


GRAPH: Any = Counted if DEVICE.type == "cuda" else Emulated


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "DecodeGraph", GRAPH)
    if DEVICE.type == "cpu":
        monkeypatch.setenv("OSCAR_KV_BACKEND", "triton")
        for operation in ("attend", "pack_into"):  # the interpreter is slow; appending is the point
            monkeypatch.setattr(triton_backend, operation, getattr(reference, operation))
        monkeypatch.setattr(graph_module, "require_cuda", lambda device: None)
        monkeypatch.setattr(
            generation, "can_be_captured", lambda model, cache: isinstance(cache, OscarCache)
        )


def tiny_model(vocabulary: int = 300) -> Any:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=vocabulary,
        initializer_range=0.13,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    model.set_attn_implementation("oscar")
    model.generation_config.eos_token_id = None
    return model


Change = tuple[str, int]
TURNS: list[Change] = [
    ("read", 253),
    ("step", 4),  # a page is completed on the way
    ("read", 20),  # packs on the host and gives up what was reserved
    ("step", 2),
    ("crop", 9),
    ("step", 1),
    ("read", 5),  # appended by the kernel of a step
    ("step", 2),
    ("crop", 40),  # into a page
    ("step", 1),
    ("read", 150),  # to one page more than at first
    ("step", 1),
]


@torch.no_grad()
@pytest.mark.parametrize("spare", [0, 256])
def test_a_graph_goes_on_after_whatever_happened_to_its_cache(spare: int) -> None:
    """As eager steps do. Without spare room it captures again as the cache grows; never with."""
    model = tiny_model()
    caches = captured, eager = OscarCache(model.config), OscarCache(model.config)
    graph = GRAPH(model, captured)
    for seed, (kind, count) in enumerate(TURNS):
        ids = torch.randint(0, 300, (1, count), generator=torch.Generator().manual_seed(seed))
        ids = ids.to(DEVICE)
        if kind == "crop":
            for cache in caches:
                cache.crop(-count)
        elif kind == "read":
            for cache in caches:
                model(ids, past_key_values=cache)
        else:
            graph.reserve(count, spare)
            for token in ids.split(1, 1):
                found = graph(token)
                expected = model(token, past_key_values=eager).logits[:, -1]
                assert torch.linalg.vector_norm(found - expected) <= 5e-3 * expected.norm()
        assert captured.get_seq_length() == eager.get_seq_length()
    for one, other in zip(captured.packed_layers(), eager.packed_layers()):
        assert one.page_counts.tolist() == other.page_counts.tolist()
        assert one.tail_lengths.tolist() == other.tail_lengths.tolist()
    assert graph.captures == (1 if spare else 2)


@torch.no_grad()
def test_a_graph_without_room_is_refused_before_anything_is_stored() -> None:
    model = tiny_model()
    cache = OscarCache(model.config)
    graph = GRAPH(model, cache)
    one = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="run the prompt first"):
        graph(one)
    model(one.expand(1, 250), past_key_values=cache)
    with pytest.raises(ValueError, match=r"call reserve\(\) first"):
        graph(one)
    graph.reserve(2)
    graph(one)
    model(one.expand(1, 30), past_key_values=cache)
    with pytest.raises(ValueError, match="reserve"):
        graph(one)
    assert cache.get_seq_length() == 281


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    quiet()
    tokenizer = load(MODEL, "float32", "cpu").tokenizer
    return Loaded(tiny_model(len(tokenizer)), tokenizer)


def test_a_conversation_is_captured_once(loaded: Loaded) -> None:
    """Turn after turn, with the answers of eager steps; anew once the cache is another one."""
    system = "import os\n" * 60
    captured = Conversation(loaded, "compact", system)
    eager = Conversation(loaded, "compact", system, cuda_graph=False)
    graph: Any = captured._graph
    assert isinstance(graph, GRAPH)
    assert eager._graph is None
    for text in ("def read(path):", "class File:\n    def write(self, text):", "x = 1"):
        answers = [
            [answer for _, answer in conversation.reply(text, 4)][-1]
            for conversation in (captured, eager)
        ]
        assert answers[0] == answers[1]
        assert captured.ids == eager.ids
        assert captured.cache.get_seq_length() == len(captured.ids)
    assert captured._graph is graph
    assert graph.captures == 1
    captured.reset()
    assert captured._graph is not graph
    assert list(captured.reply("x = 1", 3))


def test_a_graph_that_cannot_be_had(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "can_be_captured", lambda model, cache: False)
    assert Conversation(loaded, "compact")._graph is None
    with pytest.raises(ValueError, match="--cuda-graph: needs a GPU"):
        Conversation(loaded, "compact", cuda_graph=True)
