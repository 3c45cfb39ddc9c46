"""Gives the bundled model eyes: a small LLaVA that says what is drawn in a picture.

    python tools/train_demo_vlm.py --out vlm

A ViT and a projector, new, in front of the bundled language model, trained together on pictures
drawn here: a shape of some colour in a corner, described in four words. Minutes on a CPU.
It knows nothing else; it is there because the keys and values of random weights say nothing.
The folder gets the checkpoint, its processor, ``training.json``, and a photograph that comes with
matplotlib (Grace Hopper, public domain), cut into six tiles as large as it sees.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import transformers
import typer
from PIL import Image, ImageDraw
from torch import Tensor

from oscar_kv.demo import MODEL
from oscar_kv.evaluation.environment import environment
from oscar_kv.generation import load

SIDE, PATCH = 112, 16
COLORS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "triangle")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
QUESTION = "<image>\n"


@dataclass(frozen=True)
class Scene:
    """A shape of some colour in one corner of a picture."""

    color: str
    shape: str
    row: str
    column: str

    @classmethod
    def drawn(cls, draws: torch.Generator) -> Scene:
        choices = (COLORS, SHAPES, ROWS, COLUMNS)
        return cls(*(c[int(torch.randint(len(c), (), generator=draws))] for c in choices))

    def describe(self) -> str:
        return f"{self.color} {self.shape} {self.row} {self.column}\n"

    def picture(self, draws: torch.Generator) -> Image.Image:
        """Size, place in its corner and background are chance."""
        shade, tint, size, x, y = torch.rand(5, generator=draws).tolist()
        ground = (int(60 + 130 * shade), int(60 + 130 * tint), int(125 + 65 * (shade - tint)))
        image = Image.new("RGB", (SIDE, SIDE), ground)
        side = 28 + 24 * size
        left = (SIDE / 2 - side) * x + SIDE / 2 * COLUMNS.index(self.column)
        top = (SIDE / 2 - side) * y + SIDE / 2 * ROWS.index(self.row)
        right, bottom = left + side, top + side
        pen = ImageDraw.Draw(image)
        if self.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=self.color)
        elif self.shape == "square":
            pen.rectangle((left, top, right, bottom), fill=self.color)
        else:
            corners = [(left, bottom), (right, bottom), ((left + right) / 2, top)]
            pen.polygon(corners, fill=self.color)
        return image


Example = tuple[Image.Image, str]
"""A picture and what is to be said of it."""


def examples(count: int, draws: torch.Generator) -> list[Example]:
    scenes = [Scene.drawn(draws) for _ in range(count)]
    return [(scene.picture(draws), scene.describe()) for scene in scenes]


def tiles(photograph: Image.Image) -> list[Image.Image]:
    """Two columns and three rows, row by row."""
    whole = photograph.convert("RGB").resize((2 * SIDE, 3 * SIDE))
    corners = [(x * SIDE, y * SIDE) for y in range(3) for x in range(2)]
    return [whole.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def build(seed: int) -> tuple[Any, Any]:
    """The untrained model around the bundled one, in float32, and its processor."""
    torch.manual_seed(seed)
    loaded = load(MODEL, "float32", "cpu")
    words = loaded.tokenizer
    words.add_tokens("<image>", special_tokens=True)
    words.pad_token = words.bos_token
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    image_token = words.convert_tokens_to_ids("<image>")
    text = loaded.model.config
    config = transformers.LlavaConfig(
        text_config={**text.to_dict(), "vocab_size": image_token + 1},
        vision_config=vision.to_dict(),
        image_token_index=image_token,
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model: Any = transformers.LlavaForConditionalGeneration(config)
    loaded.model.resize_token_embeddings(image_token + 1)
    model.model.language_model.load_state_dict(loaded.model.model.state_dict())
    model.lm_head.load_state_dict(loaded.model.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=text.eos_token_id, bos_token_id=text.bos_token_id
    )
    return model, processor


def batch(processor: Any, pairs: list[Example]) -> dict[str, Tensor]:
    """Inputs whose labels are the descriptions alone."""
    pictures = [[picture] for picture, _ in pairs]
    texts = [QUESTION + text for _, text in pairs]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    asked = processor(text=[QUESTION], images=pictures[:1])["input_ids"][0]
    labels[:, : len(asked)] = -100
    labels[inputs["attention_mask"] == 0] = -100
    return {**inputs, "labels": labels}


@torch.no_grad()
def accuracy(model: Any, processor: Any, pairs: list[Example]) -> dict[str, float]:
    """How often greedy decoding names each attribute right."""
    asked = [QUESTION] * len(pairs)
    inputs = processor(text=asked, images=[[p] for p, _ in pairs], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    names = [field.name for field in fields(Scene)]
    right = dict.fromkeys(names, 0)
    for answer, (_, text) in zip(said, pairs):
        for name, found, word in zip(names, answer.split(), text.split()):
            right[name] += found == word
    return {name: count / len(pairs) for name, count in right.items()}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    steps: Annotated[int, typer.Option(help="Of training.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Pictures in a step.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the new weights and of the pictures.")] = 0,
) -> None:
    """Train it and write it."""
    draws = torch.Generator().manual_seed(seed)
    model, processor = build(seed)
    processor.tokenizer.padding_side = "right"
    spoken = list(model.model.language_model.parameters())
    known = {id(parameter) for parameter in spoken}
    new = [parameter for parameter in model.parameters() if id(parameter) not in known]
    optimizer = torch.optim.AdamW([{"params": spoken}, {"params": new}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-4, 1e-3], steps, pct_start=0.1)
    held_out = examples(64, torch.Generator().manual_seed(seed + 1))
    begin, curve = time.perf_counter(), []
    model.train()
    for step in range(steps):
        loss = model(**batch(processor, examples(batch_size, draws))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(round(loss.item(), 4))
        if step % 20 == 0:
            print(f"{step} {curve[-1]:.3f} {time.perf_counter() - begin:.0f} s", flush=True)
    model.eval()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    for number, tile in enumerate(tiles(Image.open(photograph))):
        tile.save(out / f"tile_{number}.png")
    weights = (out / "model.safetensors").read_bytes()
    record = {
        "environment": environment(),
        "settings": {"steps": steps, "batch_size": batch_size, "seed": seed},
        "seconds": round(time.perf_counter() - begin),
        "loss_every_20_steps": curve[::20],
        "held_out_pictures": len(held_out),
        "held_out_accuracy": accuracy(model, processor, held_out),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("seconds", "held_out_accuracy", "sha256")}))


if __name__ == "__main__":
    typer.run(main)
