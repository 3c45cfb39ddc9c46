"""A step over an engine's pages, without the engine: any schedule gives the same answer."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_checks import DEVICE
from paged_engine import Engine

from oscar_kv.config import PAGE_TOKENS


def check(engine: Engine, answers: dict[int, list[torch.Tensor]], tolerance: float = 2e-5) -> None:
    for request, parts in answers.items():
        found, expected = torch.cat(parts), engine.expected(request)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=1e-4)


def test_triton_kernels_take_the_same_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of some blocks, single tokens across the end of one, and a few tokens at once."""
    monkeypatch.setenv("OSCAR_KV_BACKEND", "triton")
    engine = Engine(2, 270, drafts=8, device=DEVICE)
    answers: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for chunks in ({0: 255, 1: 20}, {1: 1, 0: 1}, {0: 1, 1: 104}, {1: 5, 0: 2}):
        for request, answer in engine.step(chunks).items():
            answers[request].append(answer)
    check(engine, answers, tolerance=5e-3)


@pytest.mark.parametrize("chunk", [5, 16, 17, 100, 128, 129, 300, 500])
def test_a_prompt_in_chunks(chunk: int) -> None:
    engine = Engine(1, 500)
    parts = []
    while engine.computed[0] < 500:
        parts += engine.step({0: min(chunk, 500 - engine.computed[0])}).values()
    check(engine, {0: parts})


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule(seed: int) -> None:
    """Decode steps and chunks of several requests side by side, reordered and left out."""
    chance = random.Random(seed)
    engine = Engine(5, 420, drafts=8)
    answers: dict[int, list[torch.Tensor]] = {request: [] for request in range(5)}
    while min(engine.computed) < 300:
        chosen = chance.sample(range(5), chance.randint(1, 5))
        chunks = {r: chance.choice([1, 1, 2, 7, 16, 40, 130]) for r in chosen}
        chunks = {r: n for r, n in chunks.items() if engine.computed[r] + n <= 420}
        if not chunks:
            break
        for request, answer in engine.step(chunks).items():
            answers[request].append(answer)
    check(engine, answers)


def test_rejected_drafts_leave_no_trace() -> None:
    """Drafts across the end of a block complete its page; when they are rejected it is written
    again, from the exact tokens."""
    drafts = 7
    engine = Engine(1, 400, drafts=drafts + 1)
    answers = list(engine.step({0: 100}).values())
    keys, values = engine.keys.clone(), engine.values.clone()
    accepted = 0
    while engine.computed[0] < 390:
        begin = engine.computed[0]
        accepted = (accepted + 3) % drafts
        engine.keys[0, begin + 1 + accepted :] *= -3.0
        engine.values[0, begin + 1 + accepted :] += 1.0
        (answer,) = engine.step({0: 1 + drafts}).values()
        answers.append(answer[: 1 + accepted])
        engine.computed[0] = begin + 1 + accepted
        engine.keys.copy_(keys)
        engine.values.copy_(values)
    check(engine, {0: answers})


def test_a_request_that_is_computed_again_finds_shared_pages() -> None:
    """As after a prefix hit or a preemption: whole pages stay, all else comes anew."""
    engine = Engine(2, 300)
    engine.keys[1], engine.values[1] = engine.keys[0], engine.values[0]
    engine.step({0: 300})
    engine.table[1, :2] = engine.table[0, :2]
    engine.ring.data[engine.ring.table[1]] = torch.nan
    engine.computed[1] = 2 * PAGE_TOKENS
    (answer,) = engine.step({1: 44}).values()
    torch.testing.assert_close(answer.double(), engine.expected(1)[256:], atol=2e-5, rtol=1e-4)


def test_pages_completed_in_this_step_can_be_shared_in_it() -> None:
    engine = Engine(2, 300)
    engine.keys[1], engine.values[1] = engine.keys[0], engine.values[0]
    engine.table[1, :2] = engine.table[0, :2]
    engine.computed[1] = 2 * PAGE_TOKENS
    answers = engine.step({1: 3, 0: 259})
    check(engine, {0: [answers[0]]})
    torch.testing.assert_close(answers[1].double(), engine.expected(1)[256:], atol=2e-5, rtol=1e-4)
