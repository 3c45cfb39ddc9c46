"""A task for lmms-eval, made of pictures drawn here and the bundled prompt, and a LLaVA to read it:
random eyes in front of the bundled language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from oscar_kv.demo import MODEL
from oscar_kv.generation import quiet
from tools.train_demo_vlm import build

PICTURES = "demo_pictures"
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_visual: !function scoring.visual
doc_to_text: !function scoring.question
doc_to_target: answer
process_results: !function scoring.results
generation_kwargs: {{max_new_tokens: {new_tokens}}}
metric_list: [{{metric: read, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
_SCORING = """
from PIL import Image

def visual(document):
    return [Image.open(document["picture"])]

def question(document, kwargs=None):
    return document["question"]

def results(document, answers):
    return {"read": float(document["answer"] in answers[0])}
"""
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def write_picture_tasks(folder: Path, new_tokens: int = 32) -> Path:
    """A folder for ``--include_path`` with :data:`PICTURES`: two questions about numbers."""
    folder.mkdir(parents=True)
    prompt = (MODEL / "prompt.txt").read_text()
    with (folder / "questions.jsonl").open("w") as file:
        for number, answer in enumerate(("1234", "5678")):
            picture = Image.new("RGB", (80, 60), "white")
            ImageDraw.Draw(picture).text((20, 20), answer, "black")
            path = folder / f"{answer}.png"
            picture.save(path)
            question = prompt[: 2000 + 400 * number]
            row = {"question": question, "answer": answer, "picture": str(path)}
            file.write(json.dumps(row) + "\n")
    task = _TASK.format(name=PICTURES, folder=folder, new_tokens=new_tokens)
    (folder / "pictures.yaml").write_text(task)
    (folder / "scoring.py").write_text(_SCORING)
    return folder


def write_llava(folder: Path) -> tuple[Any, Any, Path]:
    """Model, processor, and the folder that they are in, as the harness loads them."""
    quiet()
    model, processor = build(seed=0)
    processor.chat_template = _TEMPLATE
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder
