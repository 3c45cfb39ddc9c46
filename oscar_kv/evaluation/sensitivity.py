"""Which layers a method hurts most: each of them quantized alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oscar_kv.evaluation.cache import MethodCache, full_layers
from oscar_kv.evaluation.methods import Method
from oscar_kv.evaluation.reference import Reference
from oscar_kv.evaluation.teacher import fill, forced, kl_divergence

STEP = 128


@torch.no_grad()
def layer_sensitivity(model: Any, tokens: Tensor, method: Method) -> list[float]:
    """What quantizing one layer alone does to the logits.

    Args:
        model: in evaluation mode.
        tokens: int ``[B, T]``; the first half is a prompt, the rest is scored in steps.
        method: of that layer; all others stay exact.

    Returns:
        Mean KL divergence from the full cache's logits, nats, for every full-attention layer.
    """
    prefix = tokens.shape[1] // 2
    reference = Reference(model)
    count = len(full_layers(model.config))
    found = []
    for layer in range(count):
        methods = [method if index == layer else None for index in range(count)]
        cache = fill(MethodCache(model.config, methods), reference.prompt(tokens[:, :prefix]))
        exact = reference.logits(tokens, prefix, STEP)
        steps = zip(exact, forced(model, tokens, cache, prefix, STEP))
        divergence = [kl_divergence(expected, logits) for expected, (logits, _) in steps]
        found.append(float(torch.cat(divergence, 1).mean()))
    return found
