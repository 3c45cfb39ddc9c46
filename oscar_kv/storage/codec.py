"""Tokens to page bytes and back, in plain torch on any device.

This is what ``pack`` and ``unpack`` mean; every other backend must write and read the same pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.core.grid import FITS, Grid, round_fp8, round_fp16
from oscar_kv.core.rotation import rotate, rotate_back
from oscar_kv.core.scaling import token_scale, unbiased_token_scale
from oscar_kv.storage.checks import zero_nonfinite
from oscar_kv.storage.layout import PLANES, TILE, PageLayout, by_slot, by_token

VALUE_PEAK = 128.0
"""The largest value of a page is brought to 64..128: the zero of a corrected grid may lie outside
the data, and E4M3 ends at 448."""
# Elements of one tensor quantized at a time: small enough to stay in a CPU cache.
_CHUNK_ELEMENTS = 1 << 18
# Within these, kernels may carry a page's unit in the exponent of a float32 softmax.
UNIT_RANGE = (2.0**-60, 2.0**60)

_ROUNDING = {"fp8": round_fp8, "fp16": round_fp16}


class QuantizedKeys(NamedTuple):
    """Rotated keys of whole pages on their grid: ``k = token_scale * (scale * code + zero)``."""

    grid: Grid
    """codes ``[N, H, G, key_group, D]``, scale and zero ``[N, H, G, 1, D]``."""
    token_scale: Tensor
    """float32 ``[N, H, 128, 1]``."""


class QuantizedValues(NamedTuple):
    """Rotated values of whole pages on their grid: ``v = unit * (scale * code + zero)``."""

    grid: Grid
    """codes ``[N, H, 128, V, value_group]``, scale and zero ``[N, H, 128, V, 1]``."""
    unit: Tensor
    """float32 ``[N, H, 1, 1, 1]``, a power of two."""


def quantize_keys(keys: Tensor, layout: PageLayout) -> QuantizedKeys:
    """Quantizes rotated keys, float32 ``[N, H, 128, D]`` (paper, section 4; DESIGN of the grid in
    docs/how-it-works.md)."""
    config = layout.config
    groups = (PAGE_TOKENS // config.key_group, config.key_group)
    scale = token_scale(
        keys, config.token_scale, config.token_scale_exponent, config.metadata == "fp8"
    )
    unit_keys = keys / scale
    grid = FITS[config.fit](
        unit_keys.unflatten(2, groups), -2, config.key_bits, _ROUNDING[config.metadata]
    )
    if config.fit == "unbiased":
        read = grid.reconstruct().flatten(2, 3)
        scale = unbiased_token_scale(scale, unit_keys, read, config.token_scale)
    # A token of zeros must read as zeros whatever grid its neighbours have.
    scale = torch.where(keys.count_nonzero(-1).unsqueeze(-1) > 0, scale, 0.0)
    if config.token_scale == "cross_head":
        scale = scale.amax(1, keepdim=True).expand_as(scale)
    return QuantizedKeys(grid, scale)


def quantize_values(values: Tensor, layout: PageLayout) -> QuantizedValues:
    """Quantizes rotated values, float32 ``[N, H, 128, E]``, token by token."""
    config = layout.config
    peak = values.abs().amax((-2, -1), keepdim=True)
    unit = torch.exp2(torch.ceil(torch.log2(peak / VALUE_PEAK))).clamp(*UNIT_RANGE)
    groups = (-1, layout.value_group)
    grid = FITS[config.fit](
        (values / unit).unflatten(-1, groups), -1, config.value_bits, _ROUNDING[config.metadata]
    )
    return QuantizedValues(grid, unit.unsqueeze(-1))


def encode_pages(keys: Tensor, values: Tensor, layout: PageLayout) -> Tensor:
    """Quantizes and packs whole pages.

    Args:
        keys: ``[N, H, 128, D]`` after RoPE, unrotated, any floating-point dtype.
        values: ``[N, H, 128, E]``, unrotated.
        layout: the page layout; decides H, D and E.

    Returns:
        uint8 ``[N, H, page_bytes]``.
    """
    count, num_heads = keys.shape[:2]
    pages = keys.new_zeros((count, num_heads, layout.page_bytes), dtype=torch.uint8)
    step = max(1, _CHUNK_ELEMENTS // (num_heads * PAGE_TOKENS * layout.head_dim))
    for begin in range(0, count, step):
        chunk = slice(begin, begin + step)
        _write_keys(pages[chunk], quantize_keys(rotate(keys[chunk].float()), layout), layout)
        _write_values(pages[chunk], quantize_values(rotate(values[chunk].float()), layout), layout)
    return pages


def encode_into(
    pool: Tensor,
    page_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PageLayout,
    *,
    pages: int,
) -> None:
    """Packs the first ``pages`` pages of every sequence into a pool; tokens with NaN or Inf are
    stored as zeros.

    Args:
        pool: uint8 ``[capacity, H, page_bytes]``.
        page_ids: int32 ``[B * pages]``; page ``i`` of sequence ``b`` becomes
            ``page_ids[b * pages + i]``, and is left out where that is negative.
        keys: ``[B, H, T, D]`` with ``T >= 128 pages``.
        values: ``[B, H, T, E]``.
        layout: the page layout.
    """

    def whole_pages(states: Tensor) -> Tensor:
        split = states[:, :, : pages * PAGE_TOKENS].unflatten(2, (pages, PAGE_TOKENS))
        return split.transpose(1, 2).flatten(0, 1)

    wanted = page_ids >= 0
    new_keys, new_values = zero_nonfinite(whole_pages(keys)[wanted], whole_pages(values)[wanted])
    pool[page_ids[wanted]] = encode_pages(new_keys, new_values, layout)


def decode_pages(
    pages: Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The keys and values that ``pages`` stand for, in the original basis.

    Args:
        pages: uint8 ``[N, H, page_bytes]``.
        layout: the layout they were written with.
        dtype: of the result; the arithmetic is float32, float64 if that is asked for.

    Returns:
        keys ``[N, H, 128, D]`` and values ``[N, H, 128, E]``.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keys, values = (rotate_back(states) for states in read_pages(pages, layout, wide))
    if dtype == torch.float16:  # a reconstruction may overshoot the largest float16
        keys, values = (states.clamp(-65504.0, 65504.0) for states in (keys, values))
    return keys.to(dtype), values.to(dtype)


def read_pages(
    pages: Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """As :func:`decode_pages`, in the rotated basis; ``dtype`` is that of the arithmetic."""
    group = layout.config.key_group
    keys = key_codes(pages, layout).to(dtype).unflatten(2, (-1, group))
    scale = layout.field(pages, "key_scale").to(dtype).unsqueeze(-2)
    centre = layout.field(pages, "key_centre").to(dtype).unsqueeze(-2)
    middle = grid_middle(layout.config.key_bits)
    keys = ((keys - middle) * scale + centre).flatten(2, 3)
    keys = keys * token_scales(pages, layout).to(dtype).unsqueeze(-1)

    values = value_codes(pages, layout).to(dtype).unflatten(-1, (-1, layout.value_group))
    scale, centre = (part.to(dtype).mT.unsqueeze(-1) for part in value_grid(pages, layout))
    middle = grid_middle(layout.config.value_bits)
    values = ((values - middle) * scale + centre).flatten(-2)
    return keys, values * value_units(pages, layout).to(dtype).unsqueeze(-1)


def key_codes(pages: Tensor, layout: PageLayout) -> Tensor:
    """Key codes of ``pages`` (uint8 ``[N, H, page_bytes]``): uint8 ``[N, H, 128, D]``."""
    planes = _split_planes(layout.field(pages, "key_codes"))  # [.., planes, 16, D]
    return planes.flatten(-3, -2)


def value_codes(pages: Tensor, layout: PageLayout) -> Tensor:
    """Value codes of ``pages``: uint8 ``[N, H, 128, E]``."""
    planes = _split_planes(layout.field(pages, "value_codes"))  # [.., blocks, planes, 16, tokens]
    by_token = planes.movedim(-1, -4).movedim(-2, -4)  # [.., planes, tokens, blocks, 16]
    return by_token.flatten(-2).flatten(-3, -2)[..., : layout.value_dim]


def token_scales(pages: Tensor, layout: PageLayout) -> Tensor:
    """Token scales of ``pages``: float32 ``[N, H, 128]``, heads that share them expanded."""
    scales = layout.field(pages, "token_scale").float()
    if layout.config.token_scale != "cross_head":
        return by_token(scales)
    shared = by_token(scales.flatten(-2)[..., :PAGE_TOKENS])
    return shared.unsqueeze(-2).expand(*scales.shape[:-1], PAGE_TOKENS)


def value_grid(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Scales and centres of the values of ``pages``: float32 ``[N, H, V, 128]`` each."""
    scale, centre = layout.field(pages, "value_grid").float().unbind(-1)
    return by_token(scale), by_token(centre)


def value_units(pages: Tensor, layout: PageLayout) -> Tensor:
    """Value units of ``pages``: float32 ``[N, H, 1]``."""
    return layout.field(pages, "value_unit")


def grid_middle(bits: int) -> float:
    """The code, half-integer, that stands for the middle of a grid."""
    return (2**bits - 1) / 2


def _storable(metadata: Tensor, layout: PageLayout) -> Tensor:
    """Saturated to the range of the storage type: a plain conversion would give Inf or NaN."""
    return _ROUNDING[layout.config.metadata](metadata)


def _write_keys(pages: Tensor, keys: QuantizedKeys, layout: PageLayout) -> None:
    grid = keys.grid
    codes = grid.codes.flatten(2, 3).unflatten(2, (PLANES, -1))  # [N, H, planes, 16, D]
    layout.field(pages, "key_codes").copy_(_join_planes(codes, 2, layout.config.key_bits))
    layout.field(pages, "key_scale").copy_(grid.scale.squeeze(-2))
    middle = grid.zero + grid.scale * grid_middle(layout.config.key_bits)
    layout.field(pages, "key_centre").copy_(_storable(middle.squeeze(-2), layout))
    scales = by_slot(keys.token_scale.squeeze(-1))
    if layout.config.token_scale == "cross_head":
        heads, stored = scales.shape[1], layout.token_scales_per_page
        scales = torch.nn.functional.pad(scales[:, 0], (0, heads * stored - PAGE_TOKENS))
        scales = scales.unflatten(-1, (heads, stored))
    layout.field(pages, "token_scale").copy_(scales)


def _write_values(pages: Tensor, values: QuantizedValues, layout: PageLayout) -> None:
    grid = values.grid
    codes = grid.codes.flatten(3)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TILE))
    # [N, H, planes, 16 tokens, blocks, 16 channels] -> [N, H, blocks, planes, channels, tokens]
    codes = codes.unflatten(2, (PLANES, -1)).unflatten(-1, (-1, TILE)).permute(0, 1, 4, 2, 5, 3)
    layout.field(pages, "value_codes").copy_(_join_planes(codes, 3, layout.config.value_bits))
    middle = grid.zero + grid.scale * grid_middle(layout.config.value_bits)
    parts = (grid.scale, _storable(middle, layout))
    by_slots = torch.stack([by_slot(part.squeeze(-1).mT) for part in parts], -1)
    layout.field(pages, "value_grid").copy_(by_slots)
    layout.field(pages, "value_unit").copy_(values.unit.flatten(2))


def _join_planes(codes: Tensor, planes_dim: int, bits: int) -> Tensor:
    """uint8 codes, planes at ``planes_dim`` -> int16 words, plane sets at dim 2."""
    shape = [1] * codes.ndim
    shape[planes_dim] = PLANES
    shifts = torch.arange(0, 16, 2, device=codes.device, dtype=torch.int32).view(shape)
    sets = [
        (((codes >> low) & 3).int() << shifts).sum(planes_dim, dtype=torch.int32)
        for low in range(0, bits, 2)
    ]
    return torch.stack(sets, dim=2).to(torch.int16)


def _split_planes(words: Tensor) -> Tensor:
    """int16 words ``[N, H, sets, ...]`` with the words' rows at -2 -> uint8 codes
    ``[N, H, ..., planes, rows, last]``."""
    shifts = torch.arange(0, 16, 2, device=words.device, dtype=torch.int16).view(PLANES, 1, 1)
    planes = (words.unsqueeze(-3) >> shifts) & 3
    codes = planes.select(2, 0).to(torch.uint8)
    for index in range(1, words.shape[2]):
        codes = codes | (planes.select(2, index).to(torch.uint8) << (2 * index))
    return codes
