"""``oscar-hf`` in lm-evaluation-harness: the real harness over tasks made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import CHOICE, NEW_TOKENS, RECALL, write_tasks
from support import tiny_model

from oscar_kv import OscarCache, OscarConfig
from oscar_kv.cli import main
from oscar_kv.demo import MODEL
from oscar_kv.evaluation.cache import MethodCache
from oscar_kv.evaluation.methods import method
from oscar_kv.generation import load

pytest.importorskip("lm_eval")

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from oscar_kv.evaluation.lm_eval import OscarLM


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def plain() -> Any:
    """The bundled model and its tokenizer, as they are without the harness."""
    loaded = load(MODEL, "float32", "cpu")
    loaded.tokenizer.padding_side = "left"
    return loaded


def evaluate(tasks: Path, model: str = "oscar-hf", batch_size: int = 1, **arguments: Any) -> Any:
    return simple_evaluate(
        model=model,
        model_args={"pretrained": str(MODEL), "dtype": "float32", **arguments},
        tasks=[RECALL, CHOICE],
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )


def texts(found: Any) -> list[str]:
    return [sample["resps"][0][0] for sample in found["samples"][RECALL]]


def scores(found: Any) -> list[float]:
    return [answer[0][0] for sample in found["samples"][CHOICE] for answer in sample["resps"]]


def questions(tasks: Path) -> list[Any]:
    return [json.loads(line) for line in (tasks / "questions.jsonl").read_text().splitlines()]


def generated(plain: Any, prompts: list[str], cache: Any, **options: Any) -> list[str]:
    """What ``generate`` makes of a left-padded batch over ``cache``."""
    plain.tokenizer.pad_token = plain.tokenizer.pad_token or plain.tokenizer.eos_token
    inputs = plain.tokenizer(prompts, padding=True, return_tensors="pt")
    output = plain.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=plain.tokenizer.pad_token_id,
        **options,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return plain.tokenizer.batch_decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def full(tasks: Path) -> Any:
    return evaluate(tasks, preset="full")


@pytest.fixture(scope="module")
def compact(tasks: Path) -> Any:
    return evaluate(tasks, preset="compact")


def test_without_quantization_it_is_the_hf_model(tasks: Path, full: Any) -> None:
    theirs = evaluate(tasks, model="hf")
    assert full["results"] == theirs["results"]
    assert full["results"][RECALL]["exact_match,number"] == 1
    assert texts(full) == texts(theirs)
    # theirs reads context and continuation at once: other sums, the same numbers
    torch.testing.assert_close(scores(full), scores(theirs), rtol=1e-4, atol=1e-4)
    greedy = [[a[0][1] for a in sample["resps"]] for sample in full["samples"][CHOICE]]
    assert greedy == [[a[0][1] for a in sample["resps"]] for sample in theirs["samples"][CHOICE]]


def test_generation_is_that_of_the_cache(tasks: Path, plain: Any, full: Any, compact: Any) -> None:
    prompts = [one["question"] for one in questions(tasks)]
    cache = OscarCache(plain.model.config)
    assert texts(compact)[0] == generated(plain, prompts[:1], cache)[0]
    assert texts(compact) != texts(full)
    assert compact["results"][RECALL]["exact_match,number"] == 1
    what = compact["config"]["kv_cache"]
    assert (what["name"], what["recent_tokens"]) == ("compact", 128)
    assert what["longest"]["tokens"] > 500
    assert what["longest"]["quantized_bits_per_element"] == pytest.approx(2.21875)


def test_a_batch_is_left_padded_and_has_the_same_cache(
    tasks: Path, plain: Any, compact: Any
) -> None:
    found = evaluate(tasks, batch_size=4)
    prompts = [one["question"] for one in questions(tasks)]
    assert texts(found) == generated(plain, prompts, OscarCache(plain.model.config))
    assert found["results"][RECALL] == compact["results"][RECALL]
    assert scores(found) == scores(compact)  # nothing is padded there


def test_prompts_of_one_length_do_not_depend_on_the_batch(tasks: Path) -> None:
    lm = OscarLM(str(MODEL), dtype="float32", device="cpu")
    ids = torch.stack(
        [torch.tensor(lm.tok_encode(one["question"])[:340]) for one in questions(tasks)]
    )
    several = lm._model_generate(ids, 360, [])
    for row, together in zip(ids, several):
        assert torch.equal(lm._model_generate(row[None], 360, [])[0], together)


@torch.no_grad()
def test_a_score_is_read_from_the_packed_context(
    tasks: Path, plain: Any, full: Any, compact: Any
) -> None:
    document = questions(tasks)[1]
    context = plain.tokenizer(document["question"]).input_ids
    choices = [plain.tokenizer(f" {choice}").input_ids[1:] for choice in document["choices"]]
    expected = []
    for choice in choices:
        cache = OscarCache(plain.model.config)
        plain.model(torch.tensor([context[:-1]]), past_key_values=cache)
        fed = torch.tensor([[context[-1], *choice[:-1]]])
        logits = plain.model(fed, past_key_values=cache).logits[0].log_softmax(-1)
        expected.append(float(logits.gather(-1, torch.tensor(choice)[:, None]).sum()))
    begin = len(questions(tasks)[0]["choices"])
    found = scores(compact)[begin : begin + len(choices)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    exact = scores(full)[begin : begin + len(choices)]
    assert max(abs(one - other) for one, other in zip(found, exact)) > 0.1
    # even a single token, which the prompt alone would have predicted
    unlikely = [(None, context, [context[1]])]
    whole = OscarLM(str(MODEL), dtype="float32", device="cpu", preset="full")
    packed = OscarLM(str(MODEL), dtype="float32", device="cpu", preset="paper")
    (one, _), (other, _) = (lm._loglikelihood_tokens(unlikely, True)[0] for lm in (whole, packed))
    assert abs(one - other) > 0.01


@torch.no_grad()
def test_long_continuations_read_what_is_packed_of_themselves(plain: Any, tasks: Path) -> None:
    ids = plain.tokenizer(questions(tasks)[3]["question"]).input_ids[:500]
    logits = plain.model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    expected = float(logits.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
    request = [(None, ids[:1], ids[1:])]
    lms = [
        OscarLM(str(MODEL), dtype="float32", device="cpu", preset=preset)
        for preset in ("full", "compact", "paper")
    ]
    full, compact, paper = (lm._loglikelihood_tokens(request, True)[0][0] for lm in lms)
    assert full == pytest.approx(expected, rel=1e-5)
    assert 0.5 < abs(compact - expected) < 0.05 * abs(expected)
    assert 0.5 < abs(paper - expected) < 0.05 * abs(expected)
    # cut from the left where the model's context ends, as the harness does
    lms[0]._max_length = 100
    cut = plain.model(torch.tensor([ids[59:159]])).logits[0].log_softmax(-1)
    expected = float(cut[-20:].gather(-1, torch.tensor(ids[140:160])[:, None]).sum())
    found = lms[0]._loglikelihood_tokens([(None, ids[:140], ids[140:160])], True)
    assert found[0][0] == pytest.approx(expected, rel=1e-4)


def test_options_reach_the_cache(tasks: Path, plain: Any, compact: Any) -> None:
    prompts = [one["question"] for one in questions(tasks)]
    found = evaluate(tasks, batch_size=4, recent_tokens=0, sink_tokens=4, offloading=True,
                     prefill_chunk_size=200)  # fmt: skip
    config = OscarConfig(recent_tokens=0, sink_tokens=4)
    cache = OscarCache(plain.model.config, config)
    assert texts(found) == generated(plain, prompts, cache, prefill_chunk_size=200)
    assert max(abs(one - other) for one, other in zip(scores(found), scores(compact))) > 0.1
    assert {"sink_tokens": 4}.items() <= found["config"]["kv_cache"].items()


def test_peers(tasks: Path, plain: Any) -> None:
    found = evaluate(tasks, batch_size=4, method="kivi:group=64")
    prompts = [one["question"] for one in questions(tasks)]
    cache = MethodCache(plain.model.config, [method("kivi:group=64")])
    assert texts(found) == generated(plain, prompts, cache)
    assert found["config"]["kv_cache"]["group"] == 64
    assert found["config"]["kv_cache"]["longest"]["quantized_bits_per_element"] == 2.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "compct"}, "preset='compct': expected one of"),
        ({"preset": "full", "sink_tokens": 4}, "only for the presets"),
        ({"method": "kivi", "offloading": True}, "only for the presets"),
        ({"preset": "paper", "method": "kivi"}, "expected one of them"),
        ({"method": "kiwi"}, "method 'kiwi'"),
        ({"method": "oscar-eigen"}, "calibrate"),
        ({"key_group": 7}, "key_group=7"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0"),
        ({"preset": "compact", "sink_tokns": 4}, "sink_tokns"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        OscarLM(str(MODEL), device="cpu", **arguments)


@pytest.mark.parametrize("preset", ["full", "compact"])
def test_models_without_such_a_cache_are_refused(plain: Any, preset: str) -> None:
    model = tiny_model("T5ForConditionalGeneration")
    with pytest.raises(ValueError, match="has an encoder"):
        OscarLM(model, tokenizer=plain.tokenizer, preset=preset)


@pytest.mark.parametrize(("context", "continuation"), [(0, 1), (3, 0), (3, 65)])
def test_requests_that_cannot_be_scored_are_refused(context: int, continuation: int) -> None:
    model = OscarLM(pretrained=str(MODEL), dtype="float32", device="cpu", max_length=64)
    with pytest.raises(ValueError, match=f"a context of {context} and a continuation"):
        model._loglikelihood_tokens([(None, [5] * context, [6] * continuation)])


def test_the_command_without_the_harness(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as stop:
        main(["lm-eval", "--tasks", "gsm8k"])
    assert stop.value.code == 2
    assert 'pip install "oscar-kv[lm-eval]"' in capsys.readouterr().err
