"""Tasks for lm-evaluation-harness, made of the bundled model's held-out text: a value that is
defined at the start of a prompt, to be written out or chosen at its end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import yaml
from transformers import AutoTokenizer

from oscar_kv.demo import MODEL

RECALL, CHOICE = "demo_recall", "demo_choice"
NEW_TOKENS = 16


def write_tasks(folder: Path, questions: int = 4) -> Path:
    """A folder for ``--include_path`` with a generation task and a multiple-choice task.

    Prompts are of about 340 to 550 tokens: one to three pages, no two of the same length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with np.load(MODEL / "heldout.npz") as arrays:
        rows = arrays["recall"].astype(int)
    documents = []
    for number in range(questions):
        text = tokenizer.decode(rows[number, 1 : 330 + 70 * number])
        values = dict(re.findall(r"(REF_\w{4}) = (\d{5})", text))
        name, *_ = values
        documents.append(
            {
                "question": f"{text}\n    assert {name} ==",
                "answer": values[name],
                "choices": list(values.values())[:3],
            }
        )
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    recall = {
        **common,
        "task": RECALL,
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<never>"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": "([0-9]{5})"},
                    {"function": "take_first"},
                ],
            }
        ],
    }
    choice = {
        **common,
        "task": CHOICE,
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    for task in (recall, choice):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder
