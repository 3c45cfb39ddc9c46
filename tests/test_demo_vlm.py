"""``tools/train_demo_vlm.py``, a step of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from oscar_kv.generation import load
from tools import train_demo_vlm
from tools.train_demo_vlm import QUESTION, Scene, batch, build


def test_one_step(tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--steps", "1", "--batch-size", "2"]
    command = typer.Typer()
    command.command()(train_demo_vlm.main)
    assert CliRunner().invoke(command, asked, catch_exceptions=False).exit_code == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["settings"] == {"steps": 1, "batch_size": 2, "seed": 0}
    assert list(record["held_out_accuracy"]) == ["color", "shape", "row", "column"]
    tiles = [Image.open(path) for path in sorted(tmp_path.glob("tile_*.png"))]
    assert [tile.size for tile in tiles] == [(112, 112)] * 6
    loaded = load(tmp_path, images=True)
    inputs = loaded.processor(text=QUESTION * 6, images=tiles, return_tensors="pt")
    assert (inputs["input_ids"] == loaded.model.config.image_token_id).sum() == 6 * 49


def test_only_the_description_is_learnt() -> None:
    _, processor = build(seed=0)
    processor.tokenizer.padding_side = "right"
    draws = torch.Generator().manual_seed(0)
    scenes = [Scene("red", "circle", "top", "left"), Scene("yellow", "square", "bottom", "right")]
    inputs = batch(processor, [(one.picture(draws), one.describe()) for one in scenes])
    for labels, scene in zip(inputs["labels"], scenes):
        assert processor.decode(labels[labels >= 0]) == scene.describe()
