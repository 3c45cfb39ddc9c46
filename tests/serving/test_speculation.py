"""Drafts that are accepted and drafts that are rejected.

The last file to run: vLLM starts no other engine in a process that has drafted with n-grams. It
stumbles over a module that this has imported.
"""

from __future__ import annotations

from pathlib import Path

from engine import answers, counter, engine, prompt
from reference import assert_greedy, save_model

DRAFTS = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 2}


def test_speculation_with_rejected_drafts(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    motif = prompt(8, 12)
    prompts = [motif * 9 + prompt(seed, seed) + motif[:5] for seed in range(1, 6)]
    with engine(path, speculative_config=DRAFTS) as llm:
        found = answers(llm, prompts, 200)
        drafted = counter(llm, "spec_decode_num_draft_tokens")
        accepted = counter(llm, "spec_decode_num_accepted_tokens")
    assert 0 < accepted < drafted
    assert_greedy(path, prompts, found)
