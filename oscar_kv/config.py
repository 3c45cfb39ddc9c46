"""What to quantize and how: one frozen dataclass, four presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

PAGE_TOKENS = 128
"""Tokens in one page. Fixed: layouts and kernels are built around it."""

Fit = Literal["unbiased", "minmax"]
Metadata = Literal["fp8", "fp16"]
TokenScale = Literal["per_head", "cross_head", "none"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "key_bits": (2, 4),
    "value_bits": (2, 4),
    "key_group": (16, 32, 64, 128),
    "fit": ("unbiased", "minmax"),
    "metadata": ("fp8", "fp16"),
    "token_scale": ("per_head", "cross_head", "none"),
}


@dataclass(frozen=True, kw_only=True)
class OscarConfig:
    """How a KV cache is quantized. Hashable and immutable; every field is validated.

    The defaults are the ``compact`` preset.

    Attributes:
        key_bits, value_bits: bits per code, 2 or 4.
        key_group: consecutive tokens that share one (scale, centre) per key channel; divides 128.
        value_group: channels that share one (scale, centre) per value token; ``None`` is the whole
            head. Where it does not divide the head, the nearest divisor is used (head_dim 80
            turns 32 into 40), see :meth:`value_group_for`.
        fit: ``"minmax"`` is the paper's grid, ``"unbiased"`` codes of a small error with the
            shrinkage undone (docs/how-it-works.md).
        metadata: storage type of scales and centres. ``"fp8"`` is E4M3.
        token_scale: what one key scale covers: a token of one KV head, a token across all KV
            heads (paper), or ``"none"`` for plain per-channel quantization.
        token_scale_exponent: the norm's exponent in the token scale (1 factors it out fully).
        recent_tokens: newest tokens that always stay in full precision.
        sink_tokens: first tokens that always stay in full precision.
        check_finite: raise on NaN, Inf or numbers too large for the metadata before anything is
            stored (costs a device synchronisation on a GPU). When off, a token with NaN or Inf
            is stored as zeros.
    """

    key_bits: int = 2
    value_bits: int = 2
    key_group: int = 128
    value_group: int | None = None
    fit: Fit = "unbiased"
    metadata: Metadata = "fp8"
    token_scale: TokenScale = "per_head"
    token_scale_exponent: float = 1.0
    recent_tokens: int = 128
    sink_tokens: int = 0
    check_finite: bool = True

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value not in accepted or type(value) is not type(accepted[0]):
                raise ValueError(f"{name}={value!r}: expected one of {accepted}")
        if self.value_group is not None:
            _require_int("value_group", self.value_group, minimum=8)
        _require_int("recent_tokens", self.recent_tokens, minimum=0)
        _require_int("sink_tokens", self.sink_tokens, minimum=0)
        exponent = self.token_scale_exponent
        number = isinstance(exponent, (int, float)) and not isinstance(exponent, bool)
        if not number or not 0.0 <= exponent <= 1.0:
            raise ValueError(f"token_scale_exponent={exponent!r}: expected a number in [0, 1]")
        if not isinstance(self.check_finite, bool):
            raise TypeError(f"check_finite={self.check_finite!r}: expected a bool")

    @classmethod
    def paper(cls) -> OscarConfig:
        """The setting of arXiv 2605.19660: min/max grids over 32, fp16 metadata, no window."""
        return cls(
            key_group=32,
            value_group=32,
            fit="minmax",
            metadata="fp16",
            token_scale="cross_head",
            recent_tokens=0,
        )

    @classmethod
    def compact(cls) -> OscarConfig:
        """The default: 2.2 bits per element at head_dim 128."""
        return cls()

    @classmethod
    def quality(cls) -> OscarConfig:
        """Key groups of 32 instead of 128: 2.4 bits per element."""
        return cls(key_group=32)

    @classmethod
    def high(cls) -> OscarConfig:
        """4-bit keys, 2-bit values: 3.2 bits per element."""
        return cls(key_bits=4)

    @classmethod
    def preset(cls, name: str) -> OscarConfig:
        """The preset called ``name``.

        Raises:
            ValueError: if there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset={name!r}: expected one of {PRESETS}")
        return getattr(cls, name)()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> OscarConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if a field is unknown or has a value that is not accepted.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown OscarConfig fields {unknown}: expected {sorted(known)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)

    def value_group_for(self, head_dim: int) -> int:
        """Channels per value group at this ``head_dim``: the divisor nearest to `value_group`."""
        if self.value_group is None:
            return head_dim
        wanted = self.value_group
        divisors = [d for d in range(8, head_dim + 1) if head_dim % d == 0]
        return min(divisors, key=lambda d: (abs(d - wanted), d))

    def bits_per_element(
        self, head_dim: int, num_kv_heads: int, value_head_dim: int | None = None
    ) -> float:
        """Stored bits per K/V element of a packed page, metadata and padding included.

        Args:
            head_dim: channels of one key head.
            num_kv_heads: KV heads of the layer.
            value_head_dim: channels of one value head, where it differs.
        """
        from oscar_kv.storage.layout import PageLayout

        return PageLayout(self, head_dim, num_kv_heads, value_head_dim).bits_per_element


PRESETS = ("paper", "compact", "quality", "high")

FULL_PRECISION = "full"
"""What the cache in the model's own dtype is called where it stands beside the presets."""


def _require_int(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r}: expected an integer >= {minimum}")
