"""How many bytes a KV cache takes, worked out from a model's configuration alone.

Only full-attention layers grow without bound and only they are quantized. Sliding-window layers
keep their newest tokens, linear-attention layers a state of fixed size, and layers that read
another layer's cache keep nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from oscar_kv.checkpoints import local_or_id
from oscar_kv.config import PAGE_TOKENS, PRESETS, OscarConfig
from oscar_kv.integrations.models import ImageLayer, cache_layers, is_quantized
from oscar_kv.integrations.vllm.plugin import BACKENDS
from oscar_kv.integrations.vllm.rows import ring_shape
from oscar_kv.storage.layout import PageLayout

BASELINES = {"bf16": 2, "fp8": 1}
"""Bytes per element of the caches that presets are compared with."""

GIB = 1 << 30

LONG_CONTEXT = 32768
"""Tokens for which the compression of a longer context is worked out."""


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer caches per token."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    quantized: bool
    """Whether presets quantize it; otherwise they leave it in BF16."""
    window: int | None = None
    """The newest tokens that are kept, all if ``None``."""

    @property
    def elements(self) -> int:
        """Key and value elements of one token."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)

    def nbytes(self, method: str, tokens: int) -> int:
        """Bytes of one sequence of ``tokens`` tokens.

        A preset's full-precision tail counts as the whole buffer that is allocated for it.
        """
        if self.window is not None:
            tokens = min(tokens, self.window)
        if method in BASELINES:
            return tokens * self.elements * BASELINES[method]
        if not self.quantized:
            return tokens * self.elements * BASELINES["bf16"]
        config = OscarConfig.preset(method)
        layout = PageLayout(config, self.head_dim, self.num_kv_heads, self.value_head_dim)
        unpacked = config.sink_tokens + config.recent_tokens
        pages = max(0, tokens - unpacked) // PAGE_TOKENS
        slots = unpacked + PAGE_TOKENS
        full_precision = slots * self.elements * BASELINES["bf16"]
        return pages * self.num_kv_heads * layout.page_bytes + full_precision


@dataclass(frozen=True)
class ModelShape:
    """The cache layers of a model: ``(shape, how many of it)``, and what is not counted."""

    name: str
    layers: tuple[tuple[LayerShape, int], ...]
    uncounted: int
    """Layers without a cache that grows: linear attention, shared caches."""
    max_context: int | None
    """The longest context the model was made for, where its configuration says."""

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """The shape of the model that ``config`` describes.

        Raises:
            ValueError: if it has no full-attention layer, or does not state its heads.
        """
        shapes = [layer_shape(layer, fields) for layer, fields in cache_layers(config)]
        counts = Counter(shape for shape in shapes if shape is not None)
        text = config.get_text_config(decoder=True)
        max_context = getattr(text, "max_position_embeddings", None)
        return cls(config.model_type, tuple(counts.items()), shapes.count(None), max_context)

    def served_tokens(self, method: str, budget: int, context: int) -> int | None:
        """How many tokens vLLM keeps in ``budget`` bytes, if requests have ``context`` tokens.

        That is what it logs as its KV cache size. ``None`` where it does not serve the model with
        this cache.
        """
        layers = [layer for layer, _ in self.layers]
        if method not in (*BASELINES, *BACKENDS.values()) or len(set(layers)) != 1:
            return None
        (layer, count), *_ = self.layers
        if not layer.quantized or layer.value_head_dim != layer.head_dim:
            return None
        if method in BASELINES:
            block_tokens, recent = 16, 0
            block = block_tokens * layer.elements * BASELINES[method]
        else:
            layout = PageLayout(OscarConfig.preset(method), layer.head_dim, layer.num_kv_heads)
            block_tokens, block = PAGE_TOKENS, layer.num_kv_heads * layout.page_bytes
            recent, _ = ring_shape(block, layer.elements * BASELINES["bf16"])
        requests = budget // (count * block) / (-(-context // block_tokens) + recent)
        return int(requests * context)

    @classmethod
    def load(cls, model: str) -> ModelShape:
        """The shape of a local folder, a ``config.json`` or a Hugging Face model id.

        Raises:
            OSError, ValueError: if there is no such configuration, or none that can be planned.
        """
        config = AutoConfig.from_pretrained(local_or_id(model), trust_remote_code=False)
        return cls.from_config(config)

    def nbytes(self, method: str, context: int, batch: int = 1) -> int:
        """Bytes of the cache of ``batch`` sequences of ``context`` tokens.

        Args:
            method: a key of :data:`BASELINES` or the name of a preset.
        """
        one = sum(count * layer.nbytes(method, context) for layer, count in self.layers)
        return batch * one

    def longest_context(self, method: str, budget: int, batch: int = 1) -> int:
        """The most tokens per sequence whose cache fits in ``budget`` bytes; 0 if none does."""
        if self.nbytes(method, 1, batch) > budget:
            return 0
        fits, too_long = 1, 2
        while self.nbytes(method, too_long, batch) <= budget:
            fits, too_long = too_long, 2 * too_long
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.nbytes(method, middle, batch) <= budget:
                fits = middle
            else:
                too_long = middle
        return fits


@dataclass(frozen=True)
class PlanRow:
    """One method's line of a plan."""

    method: str
    nbytes: int
    bits_per_element: float
    """Of everything that BF16 would store, tail and padding included."""
    ratio: float
    """How many times smaller than BF16."""
    longest_context: int | None
    """Tokens per sequence that fit the memory, where a memory was given."""
    served_tokens: int | None
    """Tokens of sequences as long as planned that vLLM keeps in that memory, where it serves it."""


def plan(
    model: ModelShape,
    context: int,
    batch: int = 1,
    presets: Sequence[str] = PRESETS,
    budget: int | None = None,
) -> list[PlanRow]:
    """The cache of every baseline and preset side by side.

    Args:
        context: tokens per sequence.
        batch: sequences.
        presets: names of presets.
        budget: bytes available for the cache, to work out the longest context.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected a positive integer")
    full = model.nbytes("bf16", context, batch)
    rows = []
    for method in (*BASELINES, *presets):
        used = model.nbytes(method, context, batch)
        longest = served = None
        if budget is not None:
            longest = model.longest_context(method, budget, batch)
            served = model.served_tokens(method, budget, context)
        rows.append(PlanRow(method, used, 16 * used / full, full / used, longest, served))
    return rows


def long_context_ratio(config: PreTrainedConfig, method: str) -> float | None:
    """How many times smaller than BF16 a cache of :data:`LONG_CONTEXT` tokens is.

    ``None`` for a model whose configuration does not say what its layers cache.

    Args:
        method: a key of :data:`BASELINES` or the name of a preset.
    """
    try:
        shape = ModelShape.from_config(config)
    except ValueError:
        return None
    return shape.nbytes("bf16", LONG_CONTEXT) / shape.nbytes(method, LONG_CONTEXT)


def layer_shape(layer: Any, config: Any) -> LayerShape | None:
    """What the cache layer of a decoder layer holds, ``None`` if nothing that grows."""
    if not isinstance(layer, DynamicLayer) or isinstance(layer, ImageLayer):
        return None
    quantized = is_quantized(layer)
    window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    if (latent := getattr(config, "kv_lora_rank", None)) is not None:
        # latent attention caches one latent and one rotary key per token, whatever the heads
        return LayerShape(1, latent, config.qk_rope_head_dim, quantized, window)
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        kv_heads = 1
    kv_heads = kv_heads or heads
    head_dim = getattr(config, "head_dim", None)
    if not head_dim and heads:
        head_dim = config.hidden_size // heads
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        raise ValueError(f"{config.model_type}: its configuration states no attention heads")
    return LayerShape(kv_heads, head_dim, head_dim, quantized, window)
