"""The one definition of a page: where every byte of 128 quantized tokens lies.

A page holds 128 consecutive tokens of one KV head of one layer of one sequence, as one contiguous
block of bytes. Its fields, in order (``D`` key channels, ``E`` value channels, ``G`` key groups,
``V`` value groups, metadata of 1 or 2 bytes):

============  =================================  ==========================================
field         shape and type                     meaning
============  =================================  ==========================================
key_codes     ``[sets, 16, D]`` int16            plane ``p`` of word ``w`` is token ``16 p + w``
key_scale     ``[G, D]`` metadata                grid step of a key group, per channel
key_centre    ``[G, D]`` metadata                middle of the grid, see below
token_scale   ``[128]`` float16                  ``k = token_scale * u``, by slot; see below
value_codes   ``[sets, E / 16, 16, 16]`` int16   ``[.., b, w, t]``: plane ``p`` of the word is
                                                 channel ``16 b + w`` of token ``16 p + t``
value_grid    ``[V, 128, 2]`` metadata           (scale, centre) of a value group, by slot
value_unit    ``[1]`` float32                    multiplies scales and centres of values
============  =================================  ==========================================

A code stands for ``scale * (code - L / 2) + centre``, ``L = 2**bits - 1``. The middle is stored,
not the value of code 0, because it is smaller and so is the rounding error of a narrow float.

Every plane of a 16 x 16 tile of words is thus a 16 x 16 tile of codes, an operand of a matrix unit
as it stands, whatever the head size; where E is no multiple of 16 the last block is padded.
A 16-bit word holds eight 2-bit planes, plane ``p`` in bits ``2 p`` and ``2 p + 1``. 4-bit codes are
two sets of planes: the low two bits, then the high two.

What is stored per token lies in the order of *slots* (:func:`by_slot`): token ``16 p + w`` has slot
``8 w + p``, so that what belongs to one row of all planes is contiguous. With
a token scale shared across heads, the page of head ``h`` holds slots ``h n .. h n + n - 1``,
``n = 2 ceil(64 / H)``.
A page is padded to a multiple of 128 bytes, so that bytes per token are whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS, OscarConfig

TILE = 16
"""Rows and columns of a tile of words: tokens of one plane, and channels of a value block."""
PLANES = 8
"""2-bit planes in a 16-bit word."""

_ALIGNMENT = 16
_METADATA_DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}


@dataclass(frozen=True)
class Field:
    """One field of a page."""

    offset: int
    """Bytes from the start of the page."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, pages: Tensor) -> Tensor:
        """This field of every page, as a view.

        Args:
            pages: uint8 ``[..., page_bytes]``, last dimension contiguous.

        Returns:
            ``[..., *shape]`` of this field's dtype; writing to it writes the pages.
        """
        span = pages[..., self.offset : self.offset + self.nbytes]
        return span.view(self.dtype).unflatten(-1, self.shape)


@dataclass(frozen=True)
class PageLayout:
    """Fields and sizes of the pages of one layer.

    Args:
        config: what is quantized and how.
        head_dim: channels of one key head, a multiple of 8.
        num_kv_heads: KV heads of the layer.
        value_head_dim: channels of one value head; ``head_dim`` if omitted.

    Raises:
        ValueError: if a size cannot be laid out.
    """

    config: OscarConfig
    head_dim: int
    num_kv_heads: int
    value_head_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("head_dim", "value_head_dim"):
            size = getattr(self, name)
            if name == "value_head_dim" and size is None:
                continue
            if not isinstance(size, int) or size < 16 or size % 8:
                raise ValueError(f"{name}={size!r}: expected a multiple of 8, at least 16")
        if not isinstance(self.num_kv_heads, int) or self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads={self.num_kv_heads!r}: expected a positive integer")

    @property
    def value_dim(self) -> int:
        """Channels of one value head."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def value_group(self) -> int:
        """Channels that share one (scale, centre) per value token."""
        return self.config.value_group_for(self.value_dim)

    @property
    def token_scales_per_page(self) -> int:
        """Token scales stored in one page: fewer than 128 where all heads share them."""
        if self.config.token_scale == "cross_head":
            return 2 * math.ceil(PAGE_TOKENS / 2 / self.num_kv_heads)
        return PAGE_TOKENS

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Every field by name, in the order of its bytes."""
        config = self.config
        metadata = _METADATA_DTYPES[config.metadata]
        key_groups = PAGE_TOKENS // config.key_group
        value_groups = self.value_dim // self.value_group
        value_words = (math.ceil(self.value_dim / TILE), TILE, TILE)
        shapes = {
            "key_codes": ((config.key_bits // 2, TILE, self.head_dim), torch.int16),
            "key_scale": ((key_groups, self.head_dim), metadata),
            "key_centre": ((key_groups, self.head_dim), metadata),
            "token_scale": ((self.token_scales_per_page,), torch.float16),
            "value_codes": ((config.value_bits // 2, *value_words), torch.int16),
            "value_grid": ((value_groups, PAGE_TOKENS, 2), metadata),
            "value_unit": ((1,), torch.float32),
        }
        fields, offset = {}, 0
        for name, (shape, dtype) in shapes.items():
            fields[name] = Field(offset, shape, dtype)
            offset = _round_up(offset + fields[name].nbytes, _ALIGNMENT)
        return fields

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page of one KV head."""
        last = list(self.fields.values())[-1]
        return _round_up(last.offset + last.nbytes, PAGE_TOKENS)

    @property
    def bits_per_element(self) -> float:
        """Stored bits per K/V element, metadata and padding included."""
        return self.page_bytes * 8 / (PAGE_TOKENS * (self.head_dim + self.value_dim))

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of one page split into ``codes``, ``metadata``, ``norms`` and ``padding``."""
        kinds = {"codes": 0, "metadata": 0, "norms": 0}
        for name, field in self.fields.items():
            kind = "codes" if "codes" in name else "norms" if "token" in name else "metadata"
            kinds[kind] += field.nbytes
        return {**kinds, "padding": self.page_bytes - sum(kinds.values())}

    def field(self, pages: Tensor, name: str) -> Tensor:
        """The field ``name`` of ``pages`` (uint8 ``[..., page_bytes]``) as a view."""
        return self.fields[name].of(pages)


def by_token(entries: Tensor) -> Tensor:
    """``[..., 128]`` from the order of slots to that of tokens."""
    return entries.unflatten(-1, (TILE, PLANES)).mT.flatten(-2)


def by_slot(entries: Tensor) -> Tensor:
    """``[..., 128]`` from the order of tokens to that of slots: undoes :func:`by_token`."""
    return entries.unflatten(-1, (PLANES, TILE)).mT.flatten(-2)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
