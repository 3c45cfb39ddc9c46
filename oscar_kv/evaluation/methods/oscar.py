"""Ours: any :class:`OscarConfig`, through the pages that the cache really stores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from oscar_kv.config import PAGE_TOKENS, OscarConfig
from oscar_kv.evaluation.methods.base import Method, Quantized
from oscar_kv.storage.codec import decode_pages, encode_pages
from oscar_kv.storage.layout import PageLayout


@dataclass(frozen=True, kw_only=True)
class Oscar(Method):
    """Pages written and read by the reference codec; padding is counted.

    Attributes:
        config: says everything; sinks and recent window are taken from it.
    """

    config: OscarConfig
    sink_tokens: int = field(init=False)
    recent_tokens: int = field(init=False)
    block_tokens: int = field(init=False, default=PAGE_TOKENS)
    source: ClassVar[str] = "OScaR, arXiv 2605.19660, section 4, and docs/how-it-works.md"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sink_tokens", self.config.sink_tokens)
        object.__setattr__(self, "recent_tokens", self.config.recent_tokens)

    def quantize(self, keys: Tensor, values: Tensor, start: int) -> Quantized:
        value_dim = None if values.shape[-1] == keys.shape[-1] else values.shape[-1]
        layout = PageLayout(self.config, keys.shape[-1], keys.shape[1], value_dim)
        pages = encode_pages(to_pages(keys), to_pages(values), layout)
        read = (from_pages(part, keys.shape[0]) for part in decode_pages(pages, layout))
        return Quantized(*read, bits=8 * pages.numel())

    def replaced(self, **changes: Any) -> Method:
        """A copy with other fields of the config."""
        return replace(self, config=OscarConfig.from_dict({**self.config.to_dict(), **changes}))


def to_pages(states: Tensor) -> Tensor:
    """``[B, H, n 128, D]`` to ``[B n, H, 128, D]``."""
    return states.unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2).flatten(0, 1)


def from_pages(pages: Tensor, batch: int) -> Tensor:
    """Undoes :func:`to_pages`."""
    return pages.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
