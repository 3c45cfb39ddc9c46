"""Teacher forcing over a cache: a prompt is read once, what follows is fed and scored in steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from oscar_kv.integrations.models import cache_argument, is_quantized

_ROWS = 64
"""Distributions that are compared at a time: with a vocabulary of 262,144 each takes 1 MiB, several
times over."""


@torch.no_grad()
def read_prompt(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> None:
    """Runs the prompt ``tokens`` (int ``[B, T]``), which attends over its exact self, into an
    empty ``cache``."""
    forward: Any = model
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    forward(tokens.to(model.device), **options, logits_to_keep=1)


@torch.no_grad()
def fill(cache: Cache, prompt: DynamicCache) -> Cache:
    """Gives an empty ``cache`` the prompt that ``prompt`` holds, as if it had read it itself.

    So the prompt is computed once for all caches that are compared, and they get equal states.
    """
    layers: list[Any] = prompt.layers
    for index, layer in enumerate(layers):
        if is_quantized(layer):
            if layer.keys is not None:  # else cross-attention to pictures that are not there
                cache.update(layer.keys, layer.values, index)
        else:
            cache.layers[index] = copy.deepcopy(layer)
    return cache


@torch.no_grad()
def forced(
    model: PreTrainedModel, tokens: Tensor, cache: Cache, begin: int, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Feeds ``tokens`` from position ``begin`` on to a cache that holds those before.

    Args:
        model: in evaluation mode.
        tokens: int ``[B, T]``.
        cache: holds ``begin`` tokens.
        begin: first token to feed.
        step: tokens per forward pass.

    Yields:
        Logits ``[B, n, V]`` and the tokens ``[B, n]`` that they should predict.
    """
    tokens = tokens.to(model.device)
    forward: Any = model
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    last = tokens.shape[1] - 1
    for first in range(begin, last, step):
        end = min(first + step, last)
        logits = forward(tokens[:, first:end], **options).logits
        yield logits, tokens[:, first + 1 : end + 1]


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """``KL(reference || logits)`` in nats over the last dimension, float32."""
    found = []
    rows = (x.reshape(-1, x.shape[-1]).split(_ROWS) for x in (reference, logits))
    for exact, other in zip(*rows):
        exact, other = exact.float().log_softmax(-1), other.float().log_softmax(-1)
        found.append((exact.exp() * (exact - other)).sum(-1))
    return torch.cat(found).view(reference.shape[:-1])
