"""What our cache does for one model class of Transformers, found out by using it.

A tiny random model of the class generates with its own full-precision cache; with ours where
everything stays in the exact tail, which must give the same tokens; and with ``compact``, whose
logits over the same tokens must be close. That is done twice, with the model's own attention, which
reads dequantized states, and with ``"oscar"``, which reads packed ones: both must agree.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import transformers
from omni import SPEAKING, parts
from tiny_config import merged, tiny_config
from tiny_inputs import PROMPT, Inputs, inputs_for
from tiny_overrides import NOT_BUILT, OVERRIDES
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.models.auto import modeling_auto

from oscar_kv import OscarConfig
from oscar_kv.integrations import attention_function
from oscar_kv.integrations.encoder_decoder import OscarEncoderDecoderCache
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.transformers import OscarCache

NEW_TOKENS = 8
EXACT = OscarConfig(recent_tokens=4096)

EXACT_TOLERANCE = 1e-3
"""Of logits, relative to their spread: another order of a float32 sum, through a few layers."""
PACKED_TOLERANCE = 2e-2
"""The same between packed and dequantized attention, where rounding can flip a code."""
LEAST_CORRELATION = 0.85
"""Of logits with ``compact`` and exact ones. Random models blow up what 2 bits lose, trained ones
do not: this finds a cache that is wrong, not one that is coarse."""

_MAPPINGS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one class.

    Attributes:
        status: ``packed``: attends from packed pages. ``dequantized``: the cache works, and the
            model's own attention reads it. ``unsupported``: raises. ``not tested``: no tiny model
            could be made to generate without our cache. ``wrong``: a bug.
        reason: why, where it is not ``packed``.
    """

    name: str
    status: str
    reason: str = ""


class WrongError(Exception):
    """The cache gave something else than it promises."""


@dataclass(frozen=True)
class _Run:
    """Logits ``[steps, batch, vocabulary]`` with ``compact``, and how they came about.

    Attributes:
        packed: whether attention read packed pages.
        exchanged: whether our attention function was asked to attend over the cache at all.
    """

    logits: Tensor
    packed: bool
    exchanged: bool


class Forced(LogitsProcessor):
    """Has ``generate`` follow given tokens, so that logits can be compared one by one."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self.tokens[:, self.step, None], 0.0)
        self.step += 1
        return forced


def transformers_since(*version: int) -> bool:
    """Whether the installed Transformers is ``version``, two numbers, or newer."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= version


def class_names() -> list[str]:
    """Every class that generates text token by token, whatever it reads."""
    names: set[str] = set()
    for mapping in _MAPPINGS:
        names |= set(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values())
    return sorted(names)


def examine(name: str) -> Outcome:
    """Builds a tiny model of the class ``name`` and tries everything on it."""
    if name in NOT_BUILT:
        return Outcome(name, "not tested", NOT_BUILT[name])
    try:
        model = tiny_model(name)
        generators = parts(model) if name in SPEAKING else [(model, inputs_for(model))]
    except Exception as error:
        return Outcome(name, "not tested", _in_words(error))
    outcomes = [examine_model(*generator) for generator in generators]
    worst = next((outcome for outcome in outcomes if outcome.status != "packed"), outcomes[0])
    return replace(worst, name=name)


def examine_model(model: Any, inputs: Inputs) -> Outcome:
    """Tries everything on one model that generates from ``inputs``."""
    name = type(model).__name__
    try:
        reference = _generate(model, inputs)
        if not torch.stack(reference.logits).isfinite().all():
            raise ValueError("the tiny model's own logits are not finite")
    except Exception as error:
        return Outcome(name, "not tested", _in_words(error))
    try:
        own = _try_cache(model, inputs, reference)
    except (ValueError, TypeError) as error:
        return Outcome(name, "unsupported", _in_words(error))
    except Exception as error:
        return Outcome(name, "wrong", f"its own attention: {_in_words(error)}")
    try:
        model.set_attn_implementation("oscar")
        ours = _try_cache(model, inputs, reference)
        gap = relative_gap(ours.logits[:, 0], own.logits[:, 0])
        if gap > PACKED_TOLERANCE:
            raise WrongError(f"compact, logits differ from dequantized ones by {gap:.1e}")
    except (ValueError, TypeError) as error:
        return Outcome(name, "dequantized", f'"oscar" raises: {_in_words(error)}')
    except Exception as error:
        return Outcome(name, "wrong", f'"oscar": {_in_words(error)}')
    if ours.packed:
        return Outcome(name, "packed")
    if ours.exchanged:
        return Outcome(name, "dequantized", "computes on cached states before it attends to them")
    return Outcome(name, "dequantized", "its attention cannot be exchanged")


def oscar_cache(model: Any, config: OscarConfig | None = None) -> Any:
    """The cache of ours that ``model`` takes."""
    if model.config.is_encoder_decoder:
        return OscarEncoderDecoderCache(model.config, config)
    return OscarCache(model.config, config)


def tiny_model(name: str, **overrides: Any) -> Any:
    """A random model of the class ``name``, always the same.

    Args:
        overrides: config fields besides those of ``tiny_overrides.py``.
    """
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class, merged(OVERRIDES.get(name, {}), overrides))
    torch.manual_seed(1)
    model = model_class(config).eval()
    # Wider than usual, so that attention is far from uniform and a wrong key shows.
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.data.normal_(std=0.6 * parameter.shape[-1] ** -0.5)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.max_length = None, 0, None
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 1
    return model


@torch.no_grad()
def _generate(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    if hasattr(getattr(model, "model", None), "rope_deltas"):
        model.model.rope_deltas = None  # what Qwen-VL remembers of the last prompt
    return model.generate(
        **copy.deepcopy(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def _try_cache(model: Any, inputs: Inputs, reference: Any) -> _Run:
    """Generates with both settings and compares with ``reference``.

    Raises:
        WrongError: if what comes out is not what a cache may change.
    """
    expected = torch.stack(reference.logits).float()
    exact = _generate(model, inputs, past_key_values=oscar_cache(model, EXACT))
    gap = relative_gap(torch.stack(exact.logits).float(), expected)
    if gap > EXACT_TOLERANCE or not torch.equal(exact.sequences, reference.sequences):
        raise WrongError(f"exact setting, logits differ by {gap:.1e}")

    cache = oscar_cache(model)
    forced = LogitsProcessorList([Forced(reference.sequences[:, -NEW_TOKENS:])])
    with (
        _watched("extend_attention") as extend,
        _watched("_packed_view") as view,
    ):
        compact = _generate(model, inputs, past_key_values=cache, logits_processor=forced)
    if not pages(cache):
        raise WrongError("compact, nothing was packed")
    logits = torch.stack(compact.logits).float()
    # The prompt attends over its exact self; what comes after it over what was stored.
    correlation = correlation_of(logits[1:], expected[1:])
    if not logits.isfinite().all() or not correlation > LEAST_CORRELATION:
        raise WrongError(f"compact, correlation of logits is {correlation:.3f}")
    asked = any(call.args[1].shape[2] > PROMPT for call in view.call_args_list)
    return _Run(logits, packed=extend.call_count > 0, exchanged=asked)


def _watched(function: str) -> Any:
    """A context that counts calls of a function of ``attention_function``."""
    return mock.patch.object(
        attention_function, function, wraps=getattr(attention_function, function)
    )


def pages(cache: Any) -> int:
    """How many pages the decoder's layers hold."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    packed = [layer.packed for layer in layers if isinstance(layer, OscarLayer)]
    return sum(sum(p.pages_per_sequence) for p in packed if p is not None)


def correlation_of(ours: Tensor, theirs: Tensor) -> float:
    """Correlation of logits."""
    return float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1])


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of logits, relative to their spread."""
    return float((ours - theirs).abs().max() / theirs.std())


def _in_words(error: BaseException) -> str:
    words = " ".join(str(error).replace("|", "/").split())
    kind = "" if isinstance(error, (ValueError, WrongError)) else f"{type(error).__name__}: "
    return (kind + words)[:160]
