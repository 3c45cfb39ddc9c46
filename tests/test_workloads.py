"""Ways to use one cache for more than one answer: ragged batches, forks of a prompt, files."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family, each_family, left_padded, tokens
from support import Forced
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

from oscar_kv import OscarCache, OscarConfig, save_cache
from oscar_kv.demo import MODEL
from oscar_kv.generation import load, quiet

EXACT = OscarConfig(recent_tokens=4096)
PROMPT, NEW_TOKENS = 420, 12
PADDINGS = [0, 1, 37, 160]
"""Left padding of each sequence of a batch; without it, the shortest still has a page."""

each_kind = each_family("Llama", "Gemma2", "Gemma3Text", "GptOss", "Gemma4Text")


def generate(model: Any, ids: Tensor, cache: Any, **arguments: Any) -> Any:
    arguments = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        **arguments,
    }
    return model.generate(ids, past_key_values=cache, **arguments)


def read(model: Any, ids: Tensor, config: OscarConfig | None = None) -> OscarCache:
    """A cache that holds ``ids``."""
    cache = OscarCache(model.config, config)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


# -- ragged batches --------------------------------------------------------------------------


@each_kind
def test_a_ragged_batch_answers_as_each_sequence_alone(family: Family) -> None:
    model = family.model("oscar")
    ids, mask = left_padded(tokens(len(PADDINGS), PROMPT), PADDINGS)
    together = generate(model, ids, OscarCache(model.config, EXACT), attention_mask=mask)
    for row, padding in enumerate(PADDINGS):
        own = ids[row : row + 1, padding:]
        alone = generate(model, own, OscarCache(model.config, EXACT))
        assert together[row, padding:].tolist() == alone[0].tolist()


@each_kind
def test_a_ragged_batch_of_packed_pages_is_as_close_as_each_alone(family: Family) -> None:
    """Padding moves a sequence's tokens to other pages: another error, but not a larger one."""
    model = family.model("oscar")
    ids, mask = left_padded(tokens(len(PADDINGS), PROMPT), PADDINGS)
    following = tokens(len(PADDINGS), NEW_TOKENS, seed=1)

    def logits(rows: slice, begin: int, cache: Any) -> Tensor:
        """Of the steps after the prompt, ``[rows, steps, vocabulary]``."""
        out = generate(
            model,
            ids[rows, begin:],
            cache,
            attention_mask=mask[rows, begin:],
            logits_processor=LogitsProcessorList([Forced(following[rows])]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits[1:], 1)

    together = logits(slice(None), 0, OscarCache(model.config))
    for row, padding in enumerate(PADDINGS):
        rows = slice(row, row + 1)
        exact = logits(rows, padding, DynamicCache(config=model.config))
        alone = logits(rows, padding, OscarCache(model.config))
        assert 0 < (together[rows] - exact).norm() <= 1.5 * (alone - exact).norm()


# -- one prompt, many continuations ----------------------------------------------------------


def pools(caches: list[OscarCache]) -> int:
    """Bytes of page memory that ``caches`` have together, each tensor counted once."""
    tensors = [packed.pool.data for cache in caches for packed in cache.packed_layers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def test_copies_of_a_prompt_share_its_pages_until_they_write_one() -> None:
    model = FAMILIES["Llama"].model("oscar")
    prefix = tokens(1, 1100)
    kept = read(model, prefix)
    once = pools([kept])
    assert once == sum(p.layout.page_bytes * 2 * 7 for p in kept.packed_layers())  # 2 heads
    copies = [copy.deepcopy(kept) for _ in range(6)]
    short, long = copies[:5], copies[5]
    questions = [torch.cat([prefix, tokens(1, 9, seed=seed)], 1) for seed in range(6)]
    answers = [generate(model, ids, one) for ids, one in zip(questions, short)]
    assert pools([kept, *short]) == once  # 9 + 12 tokens complete no page
    answers.append(generate(model, questions[5], long, max_new_tokens=60))
    assert pools([kept, *short]) == once
    assert once < pools([kept, *copies]) == once + pools([long])
    for ids, answer in zip(questions, answers):
        expected = generate(
            model, ids, read(model, prefix), max_new_tokens=answer.shape[1] - ids.shape[1]
        )
        assert answer.tolist() == expected.tolist()
    assert len({tuple(answer[0, -NEW_TOKENS:].tolist()) for answer in answers}) == 6
    # and the other way round: the original goes on, the copies stay
    before = [packed.dense() for packed in short[0].packed_layers()]
    generate(model, torch.cat([prefix, tokens(1, 300, seed=9)], 1), kept)
    for packed, states in zip(short[0].packed_layers(), before):
        assert all(torch.equal(one, other) for one, other in zip(packed.dense(), states))


def test_sampled_sequences_share_the_prompt() -> None:
    """Several samples of one prompt that was read once: a page of its own for what each adds."""
    model = FAMILIES["Llama"].model("oscar")
    prefix, samples = tokens(1, 1023), 4
    cache = read(model, prefix)
    one = cache.memory()
    cache.batch_repeat_interleave(samples)
    assert cache.memory()["codes"] == one["codes"]
    assert cache.memory()["tail"] == samples * one["tail"]
    ids = torch.cat([prefix, tokens(1, 1, seed=1)], 1).expand(samples, -1)
    torch.manual_seed(0)
    out = generate(model, ids, cache, do_sample=True, max_new_tokens=140)
    assert len({tuple(row) for row in out.tolist()}) == samples
    for packed in cache.packed_layers():
        assert packed.pages_per_sequence == [8] * samples
        assert packed.pool.used == 6 + 2 * samples
    # each is what it would be alone: the likeliest next token after its own 140
    for row in range(samples):
        alone = read(model, prefix)
        expected = generate(model, out[row : row + 1], alone, max_new_tokens=1)
        selected = copy.deepcopy(cache)
        selected.batch_select_indices(torch.tensor([row]))
        found = generate(model, out[row : row + 1], selected, max_new_tokens=1)
        assert found.tolist() == expected.tolist()


@torch.no_grad()
def test_what_contrastive_search_does_to_a_cache() -> None:
    """Its code lives on the hub since Transformers 5: repeat for the candidates, read them, keep
    one, roll back. With everything in the exact tail the logits are those of a ``DynamicCache``."""
    model = FAMILIES["Llama"].model("oscar")
    ours, theirs = OscarCache(model.config, EXACT), DynamicCache(config=model.config)
    packed = OscarCache(model.config)
    caches: tuple[Any, ...] = (ours, theirs, packed)

    def step(batch: int, length: int, seed: int) -> None:
        ids = tokens(batch, length, seed=seed)
        found, expected, close = (model(ids, past_key_values=c).logits for c in caches)
        assert torch.allclose(found, expected, atol=1e-4)
        correlation = torch.corrcoef(torch.stack([close.flatten(), expected.flatten()]))[0, 1]
        assert correlation > 0.9

    step(2, 300, 0)
    for round in range(3):
        for cache in caches:
            cache.batch_repeat_interleave(4)
        step(8, 1, round + 1)
        for cache in caches:
            cache.batch_select_indices(torch.tensor([2, 7]))
        step(2, 60, round + 10)
        for cache in caches:
            cache.crop(-5)
        for cache in caches:
            cache.reorder_cache(torch.tensor([1, 0]))
    lengths = {cache.get_seq_length() for cache in caches}
    assert lengths == {300 + 3 * (1 + 60 - 5)}
    assert packed.packed_layers()[0].pages_per_sequence == [2, 2]


# -- another process -------------------------------------------------------------------------

RESUME = """
import sys
import torch
from oscar_kv import load_cache
from oscar_kv.generation import load, quiet

folder, file = sys.argv[1:]
quiet()
torch.set_num_threads(1)
model = load(folder, "float32", "cpu").model
cache = load_cache(file, model)
ids = torch.load(file + ".ids")
assert cache.get_seq_length() == ids.shape[1] - 5
out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
print(out[0, ids.shape[1]:].tolist())
"""


def test_a_saved_prompt_goes_on_in_another_process(tmp_path: Path) -> None:
    quiet()
    loaded = load(MODEL, "float32", "cpu")
    text = (MODEL / "prompt.txt").read_text(encoding="utf-8")
    ids = loaded.encode(text)[:, -1200:]
    cache = read(loaded.model, ids[:, :-5], OscarConfig.quality())
    file = tmp_path / "prompt.safetensors"
    save_cache(cache, file, loaded.model)
    torch.save(ids, f"{file}.ids")
    assert file.stat().st_size < cache.nbytes
    out = loaded.model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
    command = [sys.executable, "-c", RESUME, str(MODEL), str(file)]
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == str(out[0, ids.shape[1] :].tolist())
