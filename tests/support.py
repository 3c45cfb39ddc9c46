"""What :class:`OscarCache` does for one model class of Transformers, found out by using it.

A tiny random model of the class generates with its own full-precision cache, with ``OscarCache``
where everything stays in the exact tail, which must give the same tokens, and with ``compact``,
whose logits over the same tokens must be close. Both ways to attend are tried: from the packed
pages (``attn_implementation="oscar"``), and over dequantized states by the model's own attention.
"""

from __future__ import annotations

import copy
import traceback
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from tiny_config import tiny_config
from tiny_inputs import Inputs, inputs_for
from tiny_overrides import OVERRIDES
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.models.auto import modeling_auto

from oscar_kv import OscarConfig
from oscar_kv.integrations import attention_function
from oscar_kv.integrations.encoder_decoder import OscarEncoderDecoderCache
from oscar_kv.integrations.transformers import OscarCache, OscarLayer

STATUSES = ("packed", "dequantized", "unsupported", "not tested", "wrong")
NEW_TOKENS = 8
EXACT = OscarConfig(recent_tokens=4096)
LOGIT_TOLERANCE = 1e-3
"""Relative to the spread of the logits: the order of a float32 sum, through a few layers."""
LEAST_CORRELATION = 0.85

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
        status: ``packed`` (attends from packed pages), ``dequantized`` (the cache works, the
            model's own attention reads it), ``unsupported`` (raises), ``not tested`` (no tiny
            model could be made to generate at all), or ``wrong``, which is a bug.
        reason: why, where it is not ``packed``.
    """

    name: str
    status: str
    reason: str = ""


class Wrong(AssertionError):
    """The cache gave something else than it promises."""


class _Forced(LogitsProcessor):
    """Has ``generate`` follow given tokens, so that logits can be compared one by one."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self.tokens[:, self.step, None], 0.0)
        self.step += 1
        return forced


def class_names() -> list[str]:
    """Every class that generates text token by token, whatever it reads."""
    names: dict[str, None] = {}
    for mapping in _MAPPINGS:
        values = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
        names.update(dict.fromkeys(values))
    return sorted(names)


def examine(name: str) -> Outcome:
    """Builds a tiny model of the class ``name`` and tries everything on it."""
    try:
        model, inputs, reference = _reference(name)
    except (Exception, SystemExit) as error:
        return Outcome(name, "not tested", _one_line(error))
    try:
        oscar_cache(model)
        _try_cache(model, inputs, reference)
    except (ValueError, TypeError) as error:
        return Outcome(name, "unsupported", _one_line(error))
    except Exception as error:
        return Outcome(name, "wrong", f"own attention: {_one_line(error)}")
    try:
        model.set_attn_implementation("oscar")
        if model.config._attn_implementation != "oscar":
            return Outcome(name, "dequantized", "its attention is not exchangeable")
        packed_calls = _try_cache(model, inputs, reference)
    except (ValueError, TypeError) as error:
        return Outcome(name, "dequantized", f'"oscar" raises: {_one_line(error)}')
    except Exception as error:
        return Outcome(name, "wrong", f'"oscar": {_one_line(error)}')
    if not packed_calls:
        return Outcome(name, "dequantized", "its attention does not pass through the interface")
    return Outcome(name, "packed")


def oscar_cache(model: Any, config: OscarConfig | None = None) -> Any:
    """The cache of ours that ``model`` takes."""
    if model.config.is_encoder_decoder:
        return OscarEncoderDecoderCache(model.config, config)
    return OscarCache(model.config, config)


def tiny_model(name: str) -> Any:
    """A random model of the class ``name``, always the same."""
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class, OVERRIDES.get(name))
    torch.manual_seed(1)
    model = model_class(config).eval()
    _spread_weights(model)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.max_length = None, 0, None
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 1
    return model


def _spread_weights(model: Any) -> None:
    """Widens the weights, so that attention is far from uniform and a wrong key shows."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.data.normal_(std=0.6 * parameter.shape[-1] ** -0.5)


def _reference(name: str) -> tuple[Any, Inputs, Any]:
    """The model, its prompt, and what it generates with its own full-precision cache."""
    model = tiny_model(name)
    inputs = inputs_for(model)
    reference = _generate(model, inputs)
    if not all(torch.isfinite(logits).all() for logits in reference.logits):
        raise ValueError("the tiny model's own logits are not finite")
    return model, inputs, reference


def _generate(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    if hasattr(getattr(model, "model", None), "rope_deltas"):
        model.model.rope_deltas = None  # what Qwen-VL remembers of the last prompt
    with torch.no_grad():
        return model.generate(
            **copy.deepcopy(inputs),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )


def _try_cache(model: Any, inputs: Inputs, reference: Any) -> int:
    """Compares both settings with ``reference``; returns how often packed pages were attended.

    Raises:
        Wrong: if what comes out is not what a cache may change.
    """
    exact = _generate(model, inputs, past_key_values=oscar_cache(model, EXACT))
    gap = _relative_gap(exact, reference)
    if not torch.equal(exact.sequences, reference.sequences):
        raise Wrong(f"exact cache, other tokens (logits differ by {gap:.1e})")
    if gap > LOGIT_TOLERANCE:
        raise Wrong(f"exact cache, logits differ by {gap:.1e}")

    cache = oscar_cache(model)
    forced = LogitsProcessorList([_Forced(reference.sequences[:, -NEW_TOKENS:])])
    with mock.patch.object(
        attention_function, "extend_attention", wraps=attention_function.extend_attention
    ) as attend:
        compact = _generate(model, inputs, past_key_values=cache, logits_processor=forced)
    written = getattr(cache, "self_attention_cache", cache)
    layers = [layer for layer in written.layers if isinstance(layer, OscarLayer)]
    packed = [layer.packed for layer in layers if layer.packed is not None]
    if not packed or not any(sum(p.pages_per_sequence) for p in packed):
        raise Wrong("the cache was not used")
    logits = torch.stack(compact.logits[1:]).float()
    if not torch.isfinite(logits).all():
        raise Wrong("compact: logits are not finite")
    both = torch.stack([logits.flatten(), torch.stack(reference.logits[1:]).float().flatten()])
    correlation = float(torch.corrcoef(both)[0, 1])
    if not correlation > LEAST_CORRELATION:
        raise Wrong(f"compact: correlation of logits {correlation:.3f}")
    return attend.call_count


def _relative_gap(ours: Any, theirs: Any) -> float:
    a, b = (torch.stack(out.logits).float() for out in (ours, theirs))
    return float((a - b).abs().max() / b.std())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({where.filename.split('/')[-1]}:{where.lineno})"[:400]
