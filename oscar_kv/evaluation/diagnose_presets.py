"""What every preset does to a model's next tokens after one prompt, and which one that suggests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from oscar_kv.config import FULL_PRECISION, PRESETS, OscarConfig
from oscar_kv.evaluation.quality import make_cache
from oscar_kv.evaluation.teacher import kl_divergence
from oscar_kv.integrations.models import cache_argument

NEW_TOKENS = 64
"""Length of a continuation that the model has to find itself."""
KL_LIMIT = 0.02
"""Nats: what counts as close to the full-precision cache. On the models of docs/evaluation.md the
presets below it cost 1.2% of perplexity at most."""


@dataclass(frozen=True)
class PresetResult:
    """One preset, decoding token by token with the cache that users have."""

    name: str
    bits: float
    """Per element of a page."""
    tokens: int
    """Of the continuation that was decoded."""
    kl: float
    """Mean divergence of its next-token distribution from the full-precision cache's, nats."""
    agreement: float
    """Share of steps with the same most likely token."""
    attention: float
    """Relative error of the attention output, as :class:`~oscar_kv.evaluation.diagnose.StepErrors`
    has it for both: the mean over layers."""


@dataclass(frozen=True)
class Recommendation:
    """A preset, or none that is close enough, and why."""

    preset: str | None
    reason: str


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    continuation: Tensor | None,
    shape: tuple[int, int, int],
    attention: Mapping[str, float],
) -> list[PresetResult]:
    """Decodes ``continuation`` with every preset's cache, those with the fewest bits first.

    Args:
        model, inputs, continuation: as in :func:`oscar_kv.evaluation.diagnose.diagnose`.
        shape: arguments of :meth:`OscarConfig.bits_per_element`.
        attention: error of the attention output by preset.
    """
    reference, tokens = _decode(model, inputs, FULL_PRECISION, continuation)
    results = []
    for preset in PRESETS:
        logits, _ = _decode(model, inputs, preset, tokens)
        results.append(
            PresetResult(
                name=preset,
                bits=OscarConfig.preset(preset).bits_per_element(*shape),
                tokens=len(logits),
                kl=float(kl_divergence(reference, logits).mean()),
                agreement=float((reference.argmax(-1) == logits.argmax(-1)).float().mean()),
                attention=attention[preset],
            )
        )
    return sorted(results, key=lambda one: one.bits)


def recommend(presets: Sequence[PresetResult], limit: float = KL_LIMIT) -> Recommendation:
    """The preset with the fewest bits whose divergence is at most ``limit``."""
    close = [one for one in presets if one.kl <= limit]
    rule = f"at most {limit:g} nats of divergence"
    if not close:
        best = min(presets, key=lambda one: one.kl)
        return Recommendation(
            None,
            f"No preset predicts what follows this input nearly as the full-precision cache does "
            f"({rule}). The nearest is {_in_words(best)}. Keep full precision, or compare answers "
            "before you use it.",
        )
    chosen = min(close, key=lambda one: one.bits)
    reason = (
        "It stores the fewest bits of the presets that predict what follows this input nearly as "
        f"the full-precision cache does ({rule}): {_in_words(chosen)}."
    )
    if smaller := [one for one in presets if one.bits < chosen.bits]:
        reason += " Smaller, but too far off: " + "; ".join(map(_in_words, smaller)) + "."
    return Recommendation(chosen.name, reason)


def _in_words(one: PresetResult) -> str:
    return (
        f"{one.name}, {one.bits:.2f} bits per element, chooses the same next token in "
        f"{one.agreement:.1%} of {one.tokens} steps, its probabilities are {one.kl:.4f} nats away "
        f"(KL divergence), and the attention output of a layer is off by {one.attention:.1%}"
    )


class _Forced(LogitsProcessor):
    """Has ``generate`` follow given tokens ``[N]``."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[self.step]] = 0.0
        self.step += 1
        return forced


@torch.no_grad()
def _decode(
    model: Any, inputs: Mapping[str, Any], name: str, continuation: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits ``[N, V]`` and tokens ``[1, N]``, by ``generate``: it knows how to go on after images.

    Tokens behind an end of text are not decoded.
    """
    forced = None
    if continuation is not None:
        forced = LogitsProcessorList([_Forced(continuation[0])])
    placed = {
        key: value.to(model.device) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }
    out = model.generate(
        **placed,
        **{cache_argument(model): make_cache(model, name)},
        max_new_tokens=NEW_TOKENS if continuation is None else continuation.shape[1],
        do_sample=False,
        num_beams=1,
        logits_processor=forced,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits)
    return logits, out.sequences[:, -len(logits) :]
