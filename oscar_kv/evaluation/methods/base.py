"""What a quantizer of KV caches is here, and the one rule by which all of them are charged.

A method says how many tokens stay in full precision (the first ``sink_tokens``, the newest
``recent_tokens``, and whatever does not fill a block of ``block_tokens``) and what the others read
as. It quantizes every token once, in whole blocks, and counts every bit that it stores for them:
codes, scales, zeros, norms, indices. Full-precision tokens count 16 bits per element, whatever the
dtype of the model under test, and tables of a layer count once per sequence.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from oscar_kv.core.grid import round_fp16
from oscar_kv.evaluation.names import require_at_least, require_fields

FULL_PRECISION_BITS = 16


class Quantized(NamedTuple):
    """Whole blocks as attention reads them."""

    keys: Tensor
    """float32 ``[B, H, T, D]``."""
    values: Tensor
    """float32 ``[B, H, T, E]``."""
    bits: int
    """Everything that is stored for them, over the whole batch."""


class Coded(NamedTuple):
    """One tensor as it is read, and the bits that it is stored in."""

    read: Tensor
    bits: int


class LayerStates(NamedTuple):
    """What the attention of one layer was given, after RoPE, in full precision."""

    queries: Tensor
    """``[B, Hq, T, D]``."""
    keys: Tensor
    """``[B, H, T, D]``."""
    values: Tensor
    """``[B, H, T, E]``."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to quantize the keys and values of one layer. Subclasses are frozen dataclasses.

    Attributes:
        sink_tokens: first tokens that stay in full precision.
        recent_tokens: newest tokens that always stay in full precision.
        block_tokens: how many tokens are quantized together; those that do not fill a block yet
            stay in full precision.
    """

    sink_tokens: int = 0
    recent_tokens: int = 0
    block_tokens: int = 1

    source: ClassVar[str]
    """Where the method was published."""
    needs_calibration: ClassVar[bool] = False
    """Whether :meth:`for_layer` needs states of the model on other text."""

    def __post_init__(self) -> None:
        require_at_least(0, sink_tokens=self.sink_tokens, recent_tokens=self.recent_tokens)
        require_at_least(1, block_tokens=self.block_tokens)

    @abstractmethod
    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        """Quantizes whole blocks.

        Args:
            keys: float32 ``[B, H, T, D]`` after RoPE, T a multiple of `block_tokens`.
            values: float32 ``[B, H, T, E]``.
            start: how many tokens of these sequences were quantized before; 0 in the first call.
        """

    def for_layer(self, states: LayerStates | None) -> Method:
        """The method for one layer, calibrated with its ``states`` if it needs that."""
        return self

    def table_bits(self, num_kv_heads: int, head_dim: int) -> int:
        """Bits of what is stored once per layer, such as calibrated rotations."""
        return 0

    def replaced(self, **changes: Any) -> Method:
        """A copy with other parameters.

        Raises:
            ValueError: if there is no such parameter, or it does not take such a value.
        """
        require_fields(type(self), changes)
        return dataclasses.replace(self, **changes)

    def parameters(self) -> dict[str, Any]:
        """Class and fields as plain values."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}

    @property
    def immediate(self) -> bool:
        """Whether a token is read quantized as soon as it is there."""
        return self.recent_tokens == 0 and self.block_tokens == 1

    def quantized_tokens(self, length: int) -> int:
        """How many of the first ``length`` tokens are quantized, those after the sinks first."""
        older = max(0, length - self.sink_tokens - self.recent_tokens)
        return older // self.block_tokens * self.block_tokens


class View(NamedTuple):
    """All tokens of a layer as attention sees them."""

    keys: Tensor
    values: Tensor
    bits_per_element: float
    """Everything stored, full-precision tokens included, over all elements."""


def view(method: Method, keys: Tensor, values: Tensor) -> View:
    """What attention sees of a layer once all these tokens are cached.

    Args:
        method: already made :meth:`Method.for_layer` if it needs calibration.
        keys: ``[B, H, T, D]`` after RoPE.
        values: ``[B, H, T, E]``.

    Returns:
        Tensors of the same shape and dtype.
    """
    length, sinks = keys.shape[2], method.sink_tokens
    count = method.quantized_tokens(length)
    seen_keys, seen_values, bits = keys.clone(), values.clone(), 0
    if count:
        part = slice(sinks, sinks + count)
        read = method.quantize(keys[:, :, part].float(), values[:, :, part].float(), 0)
        seen_keys[:, :, part], seen_values[:, :, part] = read.keys, read.values
        bits = read.bits
    return View(seen_keys, seen_values, bits_per_element(method, keys, values, length, count, bits))


def bits_per_element(
    method: Method, keys: Tensor, values: Tensor, length: int, quantized: int, bits: int
) -> float:
    """The rule: stored bits over elements, for sequences of ``length`` tokens.

    Args:
        method: for its tables.
        keys: ``[B, H, any, D]``, for its sizes.
        values: ``[B, H, any, E]``, likewise.
        length: tokens of each sequence.
        quantized: how many of them are quantized.
        bits: stored for these, over the whole batch.
    """
    batch, heads, _, head_dim = keys.shape
    per_token = batch * heads * (head_dim + values.shape[-1])
    exact = (length - quantized) * per_token * FULL_PRECISION_BITS
    tables = batch * method.table_bits(heads, head_dim)
    return (bits + exact + tables) / (length * per_token)


def minmax_coded(x: Tensor, dim: int, group: int, bits: int, clip: float = 1.0) -> Coded:
    """Asymmetric round-to-nearest between minimum and maximum, both stored as float16.

    The grid that most published methods share: ``scale = (max - min) / (2**bits - 1)``,
    ``code = round((x - min) / scale)``, with a float16 scale and a float16 minimum per group.

    Args:
        x: float32.
        dim: negative; groups are formed of consecutive entries along it.
        group: entries of a group.
        clip: factor of minimum and maximum; what lies outside saturates.

    Raises:
        ValueError: if there are no bits, or ``group`` does not divide that dimension.
    """
    require_at_least(1, bits=bits, group=group)
    if x.shape[dim] % group:
        raise ValueError(f"group={group}: expected a divisor of {x.shape[dim]}")
    grouped = x.unflatten(dim, (-1, group))
    low, high = grouped.amin(dim, keepdim=True) * clip, grouped.amax(dim, keepdim=True) * clip
    low = round_fp16(low)
    scale = round_fp16((high - low) / (2**bits - 1))
    scale = scale.where(scale > 0, 1.0)
    codes = ((grouped - low) / scale).round_().clamp_(0, 2**bits - 1)
    stored = x.numel() * bits + 2 * 16 * scale.numel()
    return Coded((codes * scale + low).flatten(dim - 1, dim), stored)


def quantized(keys: Coded, values: Coded) -> Quantized:
    """Keys and values that were coded apart."""
    return Quantized(keys.read, values.read, keys.bits + values.bits)
