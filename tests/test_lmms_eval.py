"""Caches in lmms-eval: the real harness reads pictures drawn here with a LLaVA of random eyes in
front of the bundled language model."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest import mock

import omni
import pytest
import torch
from picture_tasks import PICTURES, write_llava, write_picture_tasks
from PIL import Image
from support import tiny_model

from oscar_kv import OscarCache, OscarConfig

pytest.importorskip("lmms_eval")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

from oscar_kv.evaluation.lmms_eval import OverCache
from oscar_kv.integrations.models import cache_argument

NEW_TOKENS = 32
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture_tasks(tmp_path_factory.mktemp("some") / "tasks", NEW_TOKENS)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model, processor, and the folder that they are in."""
    return write_llava(tmp_path_factory.mktemp("llava"))


def answers(tasks: Path, folder: Path, model: str, *arguments: str) -> list[str]:
    found: Any = simple_evaluate(
        model=model,
        model_args=",".join([f"pretrained={folder},device_map=cpu,dtype=float32", *arguments]),
        tasks=[PICTURES],
        task_manager=TaskManager("ERROR", include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    assert found["results"][PICTURES]["read,none"] == 0
    return [sample["resps"][0][0] for sample in found["samples"][PICTURES]]


def test_answers_are_those_over_the_cache(tasks: Path, llava: Any) -> None:
    model, processor, folder = llava
    theirs = answers(tasks, folder, "llava_hf")
    assert answers(tasks, folder, "oscar-llava-hf", "preset=full") == theirs
    found = answers(tasks, folder, "oscar-llava-hf", "preset=paper", "sink_tokens=2")
    assert found != theirs
    config = OscarConfig.from_dict({**OscarConfig.paper().to_dict(), "sink_tokens": 2})
    for line, answer in zip((tasks / "questions.jsonl").read_text().splitlines(), found):
        document = json.loads(line)
        text = "<image>" + document["question"]
        picture = Image.open(document["picture"])
        inputs = processor(text=text, images=picture, return_tensors="pt")
        cache = OscarCache(model.config, config)
        output = model.generate(**inputs, past_key_values=cache, **GREEDY)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True) == answer


def test_the_harness_finds_all_models() -> None:
    (point,) = (p for p in entry_points(group="lmms_eval.models") if p.name == "oscar_kv")
    names = [manifest.model_id for manifest in point.load()()]
    assert names == ["oscar-llava-hf", "oscar-qwen3-vl", "oscar-qwen3-omni"]
    assert set(names) <= set(MODEL_REGISTRY_V2.list_canonical_model_ids())


class _Harness:
    """What classes of lmms-eval have in common: a model that they generate with."""

    def __init__(self, pretrained: Any) -> None:
        self.model = pretrained


class _OverCache(OverCache, _Harness):
    pass


@torch.no_grad()
def test_a_model_that_speaks_writes_over_the_cache() -> None:
    speaking = tiny_model("Qwen3OmniMoeForConditionalGeneration")
    prompt = omni.prompt(speaking)
    with mock.patch.object(speaking, "generate", wraps=speaking.generate) as generate:
        _OverCache(speaking, preset="paper").model.generate(**prompt, return_audio=False)
    cache = generate.call_args.kwargs[f"thinker_{cache_argument(speaking.thinker)}"]
    assert isinstance(cache, OscarCache)
    assert {packed.config for packed in cache.packed_layers()} == {OscarConfig.paper()}
    assert cache.get_seq_length() >= prompt["input_ids"].shape[1]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="preset='compct'"):
        _OverCache(None, preset="compct")
    with pytest.raises(ValueError, match="has an encoder"):
        _OverCache(tiny_model("T5ForConditionalGeneration"))
