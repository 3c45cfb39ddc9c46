"""What a cache costs a real model: the order of the presets on the bundled one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import oscar_kv
import oscar_kv.integrations.transformers
from oscar_kv.config import FULL_PRECISION
from oscar_kv.evaluation.quality import make_cache, recall, score

FOLDER = Path(oscar_kv.__file__).parent / "models" / "demo"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="oscar"
    )
    return loaded.eval()


def held_out(name: str) -> Tensor:
    with np.load(FOLDER / "heldout.npz") as arrays:
        return torch.from_numpy(arrays[name].astype(np.int64))


def test_the_order_of_the_presets(model: PreTrainedModel) -> None:
    """2.2 bits with the unbiased grid lose less than the paper's 3; more bits lose less."""
    names = [FULL_PRECISION, "paper", "compact", "quality", "high"]
    scores = score(model, held_out("text")[::6], names, prefix=1024)
    loss = {name: scores[name].loss for name in names}
    assert loss["full"] < loss["high"] < loss["quality"] < loss["compact"] < loss["paper"]
    assert scores["compact"].perplexity < 1.03 * scores["full"].perplexity
    assert scores["full"].agreement == 1
    assert 0.9 < scores["paper"].agreement < scores["high"].agreement < 1


def test_scores_do_not_depend_on_the_step_of_a_full_precision_cache(
    model: PreTrainedModel,
) -> None:
    """Teacher forcing itself is right: it equals one forward pass over the window."""
    window = held_out("text")[:1, :600]
    scored = score(model, window, [FULL_PRECISION], prefix=400, step=37)[FULL_PRECISION]
    with torch.no_grad():
        logits = model(window, use_cache=False).logits[0, 400:-1]
    assert scored.tokens == 199
    expected = torch.nn.functional.cross_entropy(logits, window[0, 401:])
    assert scored.loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", [FULL_PRECISION, "compact"])
def test_values_are_recalled_through_packed_pages(model: PreTrainedModel, name: str) -> None:
    windows, answers = held_out("recall")[:2], held_out("answer_pos")[:2]
    assert recall(model, windows, answers, name) == 1
    # and the measure can fail: nobody recalls what was never said
    windows.scatter_(1, answers.flatten(1), 0)
    assert recall(model, windows, answers, name) == 0


def test_bad_arguments(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="windows="):
        score(model, torch.zeros(1, 10, dtype=torch.long), ["compact"], prefix=9)
    with pytest.raises(ValueError, match="preset='tiny'"):
        make_cache(model, "tiny")
