"""Prompts for the tiny models of ``tiny_config.py``."""

from __future__ import annotations

from typing import Any

import torch
from tiny_config import FIRST_SPECIAL_TOKEN
from torch import Tensor

PROMPT, PADDING = 400, 37
"""Tokens of a prompt, enough for a page beside the recent window, and how many are padding."""


def text(length: int = PROMPT, batch: int = 2) -> Tensor:
    """Random tokens ``[batch, length]`` without the special ones, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, FIRST_SPECIAL_TOKEN, (batch, length), generator=generator)


def left_padded_text() -> dict[str, Tensor]:
    """Two prompts, the second padded on the left."""
    ids, mask = text(), torch.ones(2, PROMPT, dtype=torch.long)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_for(model: Any) -> dict[str, Tensor]:
    """Arguments of ``generate`` for ``model``."""
    if not model.config.is_encoder_decoder:
        return left_padded_text()
    if model.main_input_name != "input_ids":
        raise NotImplementedError(f"{model.main_input_name} for {type(model).__name__}")
    return {"input_ids": text(40), "decoder_input_ids": text()}
