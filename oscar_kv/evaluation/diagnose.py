"""What makes a model's keys and values hard to quantize, and which step of ours helps against it.

The terms are those of OScaR (arXiv 2605.19660): a channel outlier widens the grid of everything
that shares it, and Token Norm Imbalance, tokens of very different norm in one group of a key
channel, spoils the small ones. Everything is measured on the states of one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS, PRESETS, OscarConfig
from oscar_kv.core.rotation import rotate
from oscar_kv.evaluation.cache import full_layers
from oscar_kv.evaluation.capture import CapturedAttention, capture_attention
from oscar_kv.evaluation.diagnose_presets import PresetResult, Recommendation, measure, recommend
from oscar_kv.evaluation.environment import environment
from oscar_kv.evaluation.methods import Ablation, Method, Quantized, method
from oscar_kv.evaluation.sensitivity import layer_sensitivity
from oscar_kv.integrations.models import require_usable_cache

QUERIES = 128
"""Newest positions whose attention output is compared; their own keys and values stay exact."""
SMALLEST = PAGE_TOKENS + QUERIES
"""Tokens of an input that has something to quantize."""
LOW, LARGE = 0.5, 2.0
"""Times the median: a key of a smaller norm is called low-norm, of a larger one large-norm."""
_KINDS = ("image", "audio", "video")


@dataclass(frozen=True)
class Norms:
    """Key norms of one head over all tokens."""

    minimum: float
    median: float
    maximum: float
    variation: float
    """Standard deviation over mean."""
    group_ratio: float | None
    """Largest over smallest norm in the group of 128 tokens where that is worst, ``None`` if it is
    without bound: Token Norm Imbalance as a quantizer meets it."""
    low: list[int]
    """Positions of low-norm tokens, such as attention sinks."""
    large: list[int]
    median_by_kind: dict[str, float]
    """Of text, image, audio and video tokens, where there are several kinds."""


@dataclass(frozen=True)
class Channels:
    """How unevenly one tensor of one head fills its channels."""

    peak: float
    """Largest over mean channel, each by its mean magnitude. 1: all alike."""
    kurtosis: float
    """Of all entries. 3: as if normal."""


@dataclass(frozen=True)
class GroupErrors:
    """Relative errors ``|x_hat - x| / |x|`` of one head at one step."""

    whole: float
    median_group: float
    """Of groups: ``key_group`` tokens of keys, single tokens of values, all channels of each."""
    worst_group: float
    worst_token: float


@dataclass(frozen=True)
class StepErrors:
    """What one step leaves of the error."""

    name: str
    bits: float
    """Per element of what is quantized."""
    keys: float
    """Relative error of the attention output with quantized keys and exact values."""
    values: float
    both: float


@dataclass(frozen=True)
class Head:
    """One KV head of one layer. ``*_groups`` are by the name of a step."""

    norms: Norms
    keys: Channels
    rotated_keys: Channels
    values: Channels
    rotated_values: Channels
    key_groups: dict[str, GroupErrors]
    value_groups: dict[str, GroupErrors]
    attention: dict[str, float]
    """Relative error of the attention output of this head's queries, both quantized."""


@dataclass(frozen=True)
class Layer:
    index: int
    heads: list[Head]
    steps: list[StepErrors]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that :func:`diagnose` found."""

    model: str
    kinds: list[str]
    """Of every token: text, image, audio or video."""
    layers: list[Layer]
    steps: list[StepErrors]
    """Means over layers."""
    presets: list[PresetResult]
    recommendation: Recommendation
    sensitivity: dict[int, float]
    """By index of the layer, what packing it alone does to the logits: KL divergence from the
    full-precision cache's, nats. Empty without a continuation, or where the model gets more than
    ids and their mask."""
    attention: dict[int, CapturedAttention]
    """What all of this was computed from, for pictures."""

    @property
    def tokens(self) -> int:
        return len(self.kinds)

    @property
    def tokens_by_kind(self) -> dict[str, int]:
        return {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the states, but with versions and hardware."""
        lists = {"layers": self.layers, "steps": self.steps, "presets": self.presets}
        return {
            "model": self.model,
            "tokens": self.tokens,
            "tokens_by_kind": self.tokens_by_kind,
            **{name: [asdict(one) for one in found] for name, found in lists.items()},
            "recommendation": asdict(self.recommendation),
            "sensitivity": self.sensitivity,
            "environment": environment(),
        }


def diagnose(
    model: Any,
    inputs: Mapping[str, Any],
    continuation: Tensor | None = None,
    *,
    name: str | None = None,
) -> Diagnosis:
    """Measures a model's keys and values on real input, and every preset on what follows it.

    Args:
        model: a causal model of Transformers, in evaluation mode.
        inputs: what a processor or tokenizer gives for one prompt: ``input_ids`` ``[1, T]`` of at
            least :data:`SMALLEST` tokens, images and sounds included.
        continuation: int ``[1, N]``, the tokens after it; what the model itself would say if
            omitted.
        name: of the model, for the report.

    Raises:
        ValueError: for other inputs, or a model whose states cannot be had or are not finite.
    """
    require_usable_cache(model.config)
    ids = _checked_ids(inputs)
    layers = capture_attention(model, inputs)
    first = next(iter(layers.values())).states
    length = first.keys.shape[2]
    kinds = token_kinds(model.config, ids)
    if len(kinds) != length:  # the model put in tokens of its own
        kinds = ["token"] * length
    measured = [measure_layer(index, layer, kinds) for index, layer in layers.items()]
    errors = {
        preset: fmean(_preset_error(layer, preset) for layer in layers.values())
        for preset in PRESETS
    }
    shape = first.keys.shape[-1], first.keys.shape[1], first.values.shape[-1]
    presets = measure(model, inputs, continuation, shape, errors)
    sensitivity: dict[int, float] = {}
    if continuation is not None and inputs.keys() <= {"input_ids", "attention_mask"}:
        text = torch.cat([ids, continuation.to(ids.device)], 1)
        found = layer_sensitivity(model, text, method("compact:recent_tokens=0"))
        sensitivity = dict(zip(full_layers(model.config), found))
    return Diagnosis(
        model=name or model.config.model_type,
        kinds=kinds,
        layers=measured,
        steps=_mean_steps([layer.steps for layer in measured]),
        presets=presets,
        recommendation=recommend(presets),
        sensitivity=sensitivity,
        attention=layers,
    )


def steps(value_dim: int) -> list[tuple[str, Ablation]]:
    """From plain group quantization to ``compact``, one change after another.

    Args:
        value_dim: channels of a value head, which the value groups have to divide.
    """
    group = OscarConfig.paper().value_group_for(value_dim)
    plain = Ablation(
        rotation=False,
        token_scale="none",
        key_fit="minmax",
        value_fit="minmax",
        unbiased_norm=False,
        metadata="fp16",
        key_group=32,
        value_group=group,
        recent_tokens=QUERIES,
    )
    rotated = replace(plain, rotation=True)
    scaled = replace(rotated, token_scale="per_head")
    fitted = replace(scaled, key_fit="unbiased", value_fit="unbiased", unbiased_norm=True)
    large = replace(fitted, key_group=128, value_group=None, metadata="fp8")
    return [
        ("plain groups of 32", plain),
        ("+ rotation", rotated),
        ("+ token scaling", scaled),
        ("+ unbiased fit", fitted),
        ("+ groups of 128", large),
    ]


def token_kinds(model_config: Any, ids: Tensor) -> list[str]:
    """``"text"``, ``"image"``, ``"audio"`` or ``"video"`` for every token of ``ids`` ``[1, T]``."""
    kinds = ["text"] * ids.shape[1]
    for kind in _KINDS:
        for field in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(model_config, field, None)
            if isinstance(token, int):
                for position in (ids[0] == token).nonzero().flatten().tolist():
                    kinds[position] = kind
    return kinds


def measure_norms(norms: Tensor, kinds: Sequence[str]) -> Norms:
    """Sums up the key norms ``[T]`` of a head, whose tokens are of these kinds."""
    norms = norms.double()
    median = float(norms.median())
    pages = norms.split(PAGE_TOKENS)
    ratios = [float(page.max() / page.min()) if page.min() > 0 else None for page in pages]
    present = list(dict.fromkeys(kinds))
    return Norms(
        minimum=float(norms.min()),
        median=median,
        maximum=float(norms.max()),
        variation=float(norms.std(correction=0) / norms.mean()),
        group_ratio=None if None in ratios else max(r for r in ratios if r is not None),
        low=(norms < LOW * median).nonzero().flatten().tolist(),
        large=(norms > LARGE * median).nonzero().flatten().tolist(),
        median_by_kind={
            kind: float(norms[[i for i, k in enumerate(kinds) if k == kind]].median())
            for kind in present
            if len(present) > 1
        },
    )


def measure_channels(x: Tensor) -> Channels:
    """Outliers of one head's keys or values, ``[T, D]``."""
    magnitude = x.double().abs().mean(0)
    centred = x.double() - x.double().mean()
    variance = centred.square().mean()
    return Channels(
        peak=float(magnitude.max() / magnitude.mean()) if magnitude.max() > 0 else 1.0,
        kurtosis=float(centred.pow(4).mean() / variance.square()) if variance > 0 else 3.0,
    )


def measure_groups(exact: Tensor, read: Tensor, group: int) -> GroupErrors:
    """Errors of one head, both ``[T, D]``, by groups of ``group`` tokens."""
    error, size = ((x.double().square().sum(-1)) for x in (read - exact, exact))
    by_group = _relative(*(x.unflatten(0, (-1, group)).sum(-1) for x in (error, size)))
    return GroupErrors(
        whole=float(_relative(error.sum(), size.sum())),
        median_group=float(by_group.median()),
        worst_group=float(by_group.max()),
        worst_token=float(_relative(error, size).max()),
    )


def measure_layer(index: int, layer: CapturedAttention, kinds: Sequence[str]) -> Layer:
    """Everything about one layer.

    Raises:
        ValueError: if its states are not finite.
    """
    keys, values = layer.states.keys.float(), layer.states.values.float()
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError(f"layer {index}: its keys or values are not finite")
    num_heads = keys.shape[1]
    exact = layer.attend(keys, values, QUERIES)
    found: list[StepErrors] = []
    key_groups: list[dict[str, GroupErrors]] = [{} for _ in range(num_heads)]
    value_groups: list[dict[str, GroupErrors]] = [{} for _ in range(num_heads)]
    by_head: list[dict[str, float]] = [{} for _ in range(num_heads)]
    for name, step in steps(values.shape[-1]):
        seen_keys, seen_values, read = _read_older(layer, step)
        both = layer.attend(seen_keys, seen_values, QUERIES)
        found.append(
            StepErrors(
                name=name,
                bits=read.bits / (read.keys.numel() + read.values.numel()),
                keys=_error(layer.attend(seen_keys, values, QUERIES), exact),
                values=_error(layer.attend(keys, seen_values, QUERIES), exact),
                both=_error(both, exact),
            )
        )
        grouped = zip(*(out[0].unflatten(0, (num_heads, -1)) for out in (both, exact)))
        for head, outputs in enumerate(grouped):
            by_head[head][name] = _error(*outputs)
            part = (0, head, slice(read.keys.shape[2]))
            key_groups[head][name] = measure_groups(keys[part], read.keys[0, head], step.key_group)
            value_groups[head][name] = measure_groups(values[part], read.values[0, head], 1)
    heads = [
        Head(
            norms=measure_norms(torch.linalg.vector_norm(keys[0, head], dim=-1), kinds),
            keys=measure_channels(keys[0, head]),
            rotated_keys=measure_channels(rotate(keys[0, head])),
            values=measure_channels(values[0, head]),
            rotated_values=measure_channels(rotate(values[0, head])),
            key_groups=key_groups[head],
            value_groups=value_groups[head],
            attention=by_head[head],
        )
        for head in range(num_heads)
    ]
    return Layer(index, heads, found)


def _checked_ids(inputs: Mapping[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids: expected one sequence of ids, [1, tokens], not {shape}")
    if ids.shape[1] < SMALLEST:
        raise ValueError(f"{ids.shape[1]} tokens of input: expected at least {SMALLEST}")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and not mask.all():
        raise ValueError("attention_mask: expected an input without padding")
    return ids


def _read_older(layer: CapturedAttention, quantizer: Method) -> tuple[Tensor, Tensor, Quantized]:
    """All keys and values, those of whole pages before the last queries as ``quantizer`` reads
    them, and these alone."""
    keys, values = layer.states.keys.float(), layer.states.values.float()
    older = (keys.shape[2] - QUERIES) // PAGE_TOKENS * PAGE_TOKENS
    read = quantizer.quantize(keys[:, :, :older], values[:, :, :older], 0)
    seen_keys = torch.cat([read.keys, keys[:, :, older:]], 2)
    seen_values = torch.cat([read.values, values[:, :, older:]], 2)
    return seen_keys, seen_values, read


def _preset_error(layer: CapturedAttention, preset: str) -> float:
    keys, values, _ = _read_older(layer, method(preset))
    exact = layer.attend(layer.states.keys, layer.states.values, QUERIES)
    return _error(layer.attend(keys, values, QUERIES), exact)


def _mean_steps(layers: list[list[StepErrors]]) -> list[StepErrors]:
    return [
        StepErrors(
            name=same[0].name,
            bits=fmean(one.bits for one in same),
            keys=fmean(one.keys for one in same),
            values=fmean(one.values for one in same),
            both=fmean(one.both for one in same),
        )
        for same in zip(*layers)
    ]


def _error(found: Tensor, exact: Tensor) -> float:
    return float(_relative((found - exact).double().square().sum(), exact.double().square().sum()))


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """Root of a ratio of squares; no error of nothing is 0."""
    return (error / size.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
