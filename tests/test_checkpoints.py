"""A model whose files lack weights is not loaded: Transformers would make them up at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from oscar_kv.checkpoints import local_or_id, some
from oscar_kv.cli import main
from oscar_kv.demo import MODEL
from oscar_kv.generation import load, quiet
from oscar_kv.planner import ModelShape

Tensors = dict[str, torch.Tensor]


def saved(name: str, folder: Path) -> Path:
    """A whole tiny model of a family in a folder, with a tokenizer."""
    if name == "Llava":
        checkpoint = checkpoints.llava()
        checkpoint.model.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
        return folder
    if name == "GPT2":  # shares its embedding by default, and once stored masks as buffers
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=4096))
    else:
        model = FAMILIES[name].model("eager")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def change(folder: Path, how: Callable[[Tensors], Any]) -> None:
    """Rewrites the weights in a folder."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "Qwen3Moe", "GPT2", "Llava"])
def test_a_whole_checkpoint_is_loaded_and_one_that_lacks_weights_is_not(
    name: str, tmp_path: Path
) -> None:
    quiet()
    folder = saved(name, tmp_path)
    images = name == "Llava"
    assert load(folder, device="cpu", images=images).unused == ()
    gone = []

    def lose(tensors: Tensors) -> None:
        gone.extend(key for key in tensors if ".1." in key and ("layers" in key or ".h." in key))
        for key in gone:
            del tensors[key]

    change(folder, lose)
    assert gone
    with pytest.raises(
        ValueError, match=r"cannot load .*the checkpoint lacks \d+ .*\.1\."
    ) as found:
        load(folder, device="cpu", images=images)
    assert "\n" not in str(found.value)


def test_shared_weights_are_missing_by_right_and_own_ones_are_not(tmp_path: Path) -> None:
    quiet()
    whole = load(MODEL, device="cpu")
    assert whole.model.config.tie_word_embeddings
    folder = saved("Llama", tmp_path)
    assert not load(folder, device="cpu").model.config.tie_word_embeddings
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights \(lm_head\.weight\)"):
        load(folder, device="cpu")


def reconfigure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    quiet()
    folder = saved("Llama", tmp_path)
    reconfigure(folder, intermediate_size=24)
    with pytest.raises(
        ValueError, match=r"have other shapes .*down_proj\.weight \[\d+, \d+\], not"
    ):
        load(folder, device="cpu")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2; weights that are of no use are only told."""

    def generate(folder: Path) -> tuple[Any, str]:
        args = ["generate", "--model", str(folder), "--prompt", "a", "--max-new-tokens", "2"]
        with pytest.raises(SystemExit) as end:
            main(args)
        return end.value.code, capsys.readouterr().err

    folder = saved("Llama", tmp_path)
    reconfigure(folder, num_hidden_layers=1)
    code, err = generate(folder)
    assert not code
    assert err.startswith("note: 9 weights of the checkpoint are of no use to the model")
    assert "model.layers.1.input_layernorm.weight" in err
    assert "and 6 more" in err
    change(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    code, err = generate(folder)
    assert code == 2
    assert err.startswith("error: cannot load")
    assert err.count("\n") == 1
    assert "model.layers.0.mlp.up_proj.weight" in err


@pytest.mark.parametrize(
    "name",
    ["", "/nonexistent", "./nonexistent", "../x", "~/nonexistent", "a/b/c", "/dev/null", "a b"],
)
def test_a_name_that_leads_nowhere(name: str) -> None:
    for read in (load, ModelShape.load, local_or_id):
        with pytest.raises(ValueError, match="no such file or folder, and no id"):
            read(name)


def test_names_that_lead_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my model").mkdir()
    assert local_or_id("~/my model") == str(tmp_path / "my model")
    assert local_or_id(tmp_path) == str(tmp_path)
    for hub in ("gpt2", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B_x", "01-ai/Yi-6B"):
        assert local_or_id(hub) == hub


def test_names_in_a_message() -> None:
    assert some(["b", "a"]) == "a, b"
    assert some("edcba") == "a, b, c and 2 more"
