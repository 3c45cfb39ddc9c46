"""One long generation: what it holds, what a step costs, and how far it drifts.

2,100 tokens in every test run, and 20,000 where tests marked ``slow`` run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, teacher_forced, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from oscar_kv import OscarCache
from oscar_kv.config import PAGE_TOKENS
from oscar_kv.integrations import attention_function
from oscar_kv.planner import ModelShape

PROMPT = 300
WINDOW = 256
"""Tokens over which an error is taken."""
FIRST_WINDOW = 512


_STORES = (torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default)
"""What they return is all of a tensor, what they write only their third argument."""


class Work(TorchDispatchMode):
    """Bytes that operations of torch write, within attention and elsewhere; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.elsewhere = 0
        self._attending = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            written = args[2] if func in _STORES else result
            count = sum(leaf.nbytes for leaf in tree_leaves(written) if isinstance(leaf, Tensor))
            self.attention += count * self._attending
            self.elsewhere += count * (not self._attending)
        return result

    @contextmanager
    def attending(self) -> Iterator[None]:
        self._attending = True
        yield
        self._attending = False


@dataclass(frozen=True)
class Step:
    """What one step wrote, in bytes."""

    attention: int
    growth: int
    """To make pools and block tables larger."""
    rest: int
    pages: int
    """Of a layer, afterwards."""
    new_pages: int


def pages_of(cache: OscarCache) -> int:
    return cache.packed_layers()[0].pages_per_sequence[0]


def memories(cache: OscarCache) -> list[Tensor]:
    """What grows by being replaced: pools and block tables."""
    return [t for packed in cache.packed_layers() for t in (packed.pool.data, packed.block_table)]


def measured_step(
    model: Any, ids: Tensor, cache: OscarCache, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Step]:
    before, pages = memories(cache), pages_of(cache)
    attend = attention_function.extend_attention
    with Work() as work, monkeypatch.context() as patch:

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            with work.attending():
                return attend(*args, **kwargs)

        patch.setattr(attention_function, "extend_attention", counted)
        logits = model(ids, past_key_values=cache).logits[:, -1]
    growth = sum(
        new.nbytes + old.nbytes for old, new in zip(before, memories(cache)) if new is not old
    )
    now = pages_of(cache)
    return logits, Step(work.attention, growth, work.elsewhere - growth, now, now - pages)


def assert_planned(model: Any, cache: OscarCache) -> None:
    """Its memory is the planner's to the byte, and pages to come are a thirty-second at most."""
    pools = [packed.pool for packed in cache.packed_layers()]
    page = [pool.layout.num_kv_heads * pool.layout.page_bytes for pool in pools]
    spare = sum((p.capacity - p.used) * size for p, size in zip(pools, page))
    planned = ModelShape.from_config(model.config).nbytes("compact", cache.get_seq_length())
    assert cache.nbytes - cache.memory()["tables"] - spare == planned
    assert all(pool.capacity - pool.used <= pool.used / 32 + 1 for pool in pools)


def assert_work_does_not_grow(steps: list[Step]) -> None:
    """But in attention, which reads what there is, and to make room, once in many pages."""
    for completes in (0, 1):
        rest = [step.rest for step in steps if step.new_pages == completes]
        assert len(rest) == (2 if completes else len(steps) - 2)
        assert len(set(rest)) == 1
    assert not any(step.growth for step in steps if not step.new_pages)
    first, last = steps[0], steps[-1]
    assert first.attention < last.attention <= first.attention * last.pages / first.pages


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / (exact - exact.mean(-1, keepdim=True)).norm())


@torch.no_grad()
@pytest.mark.parametrize("length", [2100, pytest.param(20000, marks=pytest.mark.slow)])
def test_a_long_generation(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar")).bfloat16()  # as the planner assumes
    cache = OscarCache(model.config)
    ids = [tokens(1, PROMPT)]
    logits = [model(ids[0], past_key_values=cache, logits_to_keep=1).logits[:, -1]]
    # Steps before, at and after the first and the last time that a page is completed.
    completions = range(3 * PAGE_TOKENS - 1, length - 3, PAGE_TOKENS)
    measured = {n + i for n in (completions[0], completions[-1]) for i in range(-4, 4)}
    checked = {n for n in (384, 500, 1000, 2000, 5000, 10000, 19999) if n < length}
    steps = []
    for held in range(PROMPT, length):
        ids.append(torch.multinomial(logits[-1].float().softmax(-1), 1))
        if held in measured:
            following, step = measured_step(model, ids[-1], cache, monkeypatch)
            steps.append(step)
        else:
            following = model(ids[-1], past_key_values=cache).logits[:, -1]
        logits.append(following)
        if held + 1 in checked:
            assert_planned(model, cache)
    assert cache.get_seq_length() == length
    assert_work_does_not_grow(steps)

    # Against full precision over the same tokens. What quantization alone does to a prefix of
    # exact states is the yardstick.
    whole, found = torch.cat(ids, 1), torch.cat(logits).float()
    chunks = [PAGE_TOKENS] * (length // PAGE_TOKENS) + [length % PAGE_TOKENS]
    exact = teacher_forced(model, whole, chunks, DynamicCache(config=model.config))[0].float()
    ratios = []
    for begin in (FIRST_WINDOW, length - WINDOW):
        window = slice(begin, begin + WINDOW)
        quantized = OscarCache(model.config)
        once = teacher_forced(model, whole[:, : window.stop], [begin] + [1] * WINDOW, quantized)[
            0, window
        ].float()
        drift = relative_error(found[window.start - PROMPT + 1 :][:WINDOW], exact[window])
        ratios.append(drift / relative_error(once, exact[window]))
    # States that were computed from quantized ones differ from exact ones, too. That is a constant
    # share: were errors to build up, it would rise with the length.
    assert max(ratios) < 1.5
