"""Hundreds of requests at random, in a pool too small for them."""

from __future__ import annotations

import random
from pathlib import Path

from engine import counter, engine, prompt, sampling
from reference import assert_greedy, save_model

REQUESTS = 300


def test_every_answer_is_that_of_the_request_alone(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    chance = random.Random(0)
    documents = [prompt(seed, chance.randrange(100, 500)) for seed in range(4)]
    prompts: dict[str, list[int]] = {}
    found: dict[str, list[int]] = {}
    aborted: set[str] = set()
    with engine(path, num_gpu_blocks_override=130, max_num_batched_tokens=150) as llm:
        running = llm.llm_engine
        while len(prompts) < REQUESTS or running.has_unfinished_requests():
            for _ in range(chance.choice([0, 0, 0, 1, 4])):
                if len(prompts) == REQUESTS:
                    break
                name = f"request {len(prompts)}"
                shared = chance.choice([[], chance.choice(documents)])
                own = prompt(chance.randrange(1 << 30), chance.randrange(1, 200))
                prompts[name] = shared + own
                request = {"prompt_token_ids": prompts[name]}
                running.add_request(name, request, sampling(chance.randrange(1, 80)))
            if prompts and chance.random() < 0.03:
                victim = chance.choice(sorted(prompts))
                if victim not in found:
                    running.abort_request([victim])
                    aborted.add(victim)
            for output in running.step():
                if output.finished:
                    found[output.request_id] = list(output.outputs[0].token_ids)
        preemptions = counter(llm, "num_preemptions")
        shared_tokens = counter(llm, "prefix_cache_hits")
    assert len(found) + len(aborted) >= REQUESTS
    assert min(preemptions, shared_tokens, len(aborted)) > 0
    assert_greedy(path, [prompts[name] for name in found], list(found.values()))
