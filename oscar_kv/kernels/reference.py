"""The reference backend: every operation in plain torch, on any device, fast on a CPU.

Attention works on a few pages at a time and never holds the dequantized prefix. For a few queries
the codes are multiplied as they are: masking plane ``p`` of a word leaves ``code * 4**p``, an
exact float, and that factor is divided out of the small result. Likewise the key grid is folded
into the query, the token scale into the logits and the value grid into the probabilities. For
many queries it is cheaper to dequantize each block of pages once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.core.rotation import rotate, rotate_back
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.storage import codec
from oscar_kv.storage.layout import PLANES, TILE, PageLayout
from oscar_kv.storage.packed import PackedKV
from oscar_kv.storage.paged import Sequences

# Elements of codes unpacked at a time, so that their float32 form stays in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 20
# Query rows per KV head from which dequantizing a block beats folding its grid.
_MANY_ROWS = 32

pack_into = codec.encode_into
unpack = codec.decode_pages


def append(
    packed: PackedKV, keys: Tensor, values: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`oscar_kv.kernels.append`."""
    return packed.append(keys, values, lengths=lengths, pack=pack_into)


def attend(call: AttentionCall) -> Tensor:
    """Attention of the newest ``Tq`` tokens over everything that is packed.

    Returns:
        ``[B, Hq, Tq, E]`` in the dtype of the query.
    """
    query, packed, new_keys, new_values = call.query, call.packed, call.new_keys, call.new_values
    softcap, visibility = call.softcap, call.visibility
    layout, num_queries = packed.layout, query.shape[2]
    rows = query.float().unflatten(1, (layout.num_kv_heads, -1)).flatten(2, 3) * call.scaling
    softmax = _OnlineSoftmax(rows, layout.value_dim, call.s_aux)

    def logits_of(raw: Tensor, begins: Sequence[int], ends: Sequence[int]) -> Tensor:
        capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        return visibility.apply(capped, begins, ends, packed.lengths)

    fresh = 0 if new_keys is None else num_queries
    limits = [length - fresh for length in packed.lengths]
    sinks = packed.sinks_per_sequence
    counts = packed.pages_per_sequence
    tails = packed.tails_per_sequence

    rotated = rotate(rows)
    block = _pages_per_block(packed, rows.shape[2])
    for first in range(0, max(counts), block):
        last = min(first + block, max(counts))
        pages = packed.pages(packed.block_table[:, first:last])
        begins = [s + PAGE_TOKENS * first for s in sinks]
        ends = [min(s + PAGE_TOKENS * n, limit) for s, n, limit in zip(sinks, counts, limits)]
        if rows.shape[2] < _MANY_ROWS:
            raw = _folded_logits(rotated, pages, layout)
            probs = softmax.weights(logits_of(raw, begins, ends))
            softmax.output += _folded_values(probs, pages, layout)
        else:
            keys, values = (_by_sequence(t, rows) for t in codec.read_pages(pages, layout))
            softmax.add(logits_of(rotated @ keys.mT, begins, ends), values)
    softmax.output = rotate_back(softmax.output)

    def attend_dense(
        keys: Tensor, values: Tensor, begins: Sequence[int], ends: Sequence[int]
    ) -> None:
        if keys.shape[2]:
            softmax.add(logits_of(rows @ keys.float().mT, begins, ends), values.float())

    zeros = [0] * packed.batch_size
    attend_dense(packed.sink_keys, packed.sink_values, zeros, [min(p) for p in zip(sinks, limits)])
    begins = [s + PAGE_TOKENS * n for s, n in zip(sinks, counts)]
    ends = [min(b + t, limit) for b, t, limit in zip(begins, tails, limits)]
    used = max(tails)
    attend_dense(packed.tail_keys[:, :, :used], packed.tail_values[:, :, :used], begins, ends)
    if new_keys is not None and new_values is not None:
        attend_dense(new_keys, new_values, limits, packed.lengths)
    result = softmax.finish().unflatten(2, (-1, num_queries)).flatten(1, 2)
    return call.new_result().copy_(result)


class _OnlineSoftmax:
    """Softmax-weighted sums built up block by block, rescaled as the maximum grows.

    Args:
        rows: ``[B, H, M, D]`` query rows.
        channels: of the values.
        s_aux: ``[Hq]`` logits that join the normalizer and carry no value.
    """

    def __init__(self, rows: Tensor, channels: int, s_aux: Tensor | None) -> None:
        shape = rows.shape[:3]
        self.output = rows.new_zeros((*shape, channels))
        if s_aux is None:
            self.maximum = rows.new_full((*shape, 1), -torch.inf)
            self.normalizer = rows.new_zeros((*shape, 1))
        else:
            per_head = s_aux.to(rows).view(shape[1], -1, 1)
            per_row = per_head.expand(-1, -1, shape[2] // per_head.shape[1]).flatten(1)
            self.maximum = per_row.unsqueeze(-1).expand(*shape, 1)
            self.normalizer = torch.ones_like(self.maximum)

    def weights(self, logits: Tensor) -> Tensor:
        """Unnormalized probabilities of a block of logits ``[B, H, M, N]``; rescales the sums."""
        maximum = torch.maximum(self.maximum, logits.amax(-1, keepdim=True))
        base = maximum.clamp_min(torch.finfo(maximum.dtype).min)  # a row that saw nothing yet
        rescale = torch.exp(self.maximum - base)
        probs = torch.exp(logits - base)
        self.normalizer = self.normalizer * rescale + probs.sum(-1, keepdim=True)
        self.output = self.output * rescale
        self.maximum = maximum
        return probs

    def add(self, logits: Tensor, values: Tensor) -> None:
        """Adds a block of logits ``[B, H, M, N]`` with values ``[B, H, N, E]``."""
        probs = self.weights(logits)
        self.output += probs @ values

    def finish(self) -> Tensor:
        """The weighted means ``[B, H, M, E]``; zeros for a row that saw nothing."""
        return self.output / torch.where(self.normalizer > 0, self.normalizer, 1.0)


def _pages_per_block(packed: Sequences, num_rows: int) -> int:
    per_page = packed.batch_size * packed.layout.num_kv_heads * PAGE_TOKENS
    return max(1, _BLOCK_ELEMENTS // (per_page * max(packed.layout.head_dim, num_rows)))


def _by_sequence(blocks: Tensor, rows: Tensor) -> Tensor:
    """``[B * n, H, tokens, channels]`` -> ``[B, H, n * tokens, channels]``."""
    return blocks.unflatten(0, (rows.shape[0], -1)).transpose(1, 2).flatten(2, 3)


def _folded_logits(rotated: Tensor, pages: Tensor, layout: PageLayout) -> Tensor:
    """Logits ``[B, H, M, n * 128]`` of rotated queries ``[B, H, M, D]`` over ``B * n`` pages."""
    batch, heads, num_rows, _ = rotated.shape
    group = layout.config.key_group
    query = rotated.unsqueeze(1).expand(-1, pages.shape[0] // batch, -1, -1, -1).flatten(0, 1)
    scale = layout.field(pages, "key_scale").float().unsqueeze(-2)  # [N, H, G, 1, D]
    zero = layout.field(pages, "key_centre").float()  # [N, H, G, D]
    zero = zero - scale.squeeze(-2) * codec.grid_middle(layout.config.key_bits)
    scaled = query.unsqueeze(2) * scale  # [N, H, G, M, D]
    words = layout.field(pages, "key_codes")
    logits = rotated.new_zeros(())
    for index in range(words.shape[2]):
        masks = _plane_masks(words.device).view(PLANES, 1, 1)
        # a 16-bit word masked in place is an unsigned number
        planes = (words[:, :, index].unsqueeze(2) & masks).view(torch.uint16).float()
        codes = planes.flatten(2, 3).unflatten(2, (-1, group))
        logits = logits + scaled @ codes.mT * 4**index  # [N, H, G, M, group]
    plane_unit = _plane_units(TILE, logits.device).view(-1, 1, group)
    logits = logits * plane_unit + (query @ zero.mT).mT.unsqueeze(-1)
    scales = codec.token_scales(pages, layout).unflatten(-1, (-1, 1, group))
    logits = (logits * scales).transpose(2, 3)  # [N, H, M, G, group]
    by_sequence = logits.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4, 5)
    return by_sequence.reshape(batch, heads, num_rows, -1)


def _folded_values(probs: Tensor, pages: Tensor, layout: PageLayout) -> Tensor:
    """Rotated outputs ``[B, H, M, E]`` of ``probs`` ``[B, H, M, n * 128]`` over ``B * n`` pages."""
    batch = probs.shape[0]
    by_page = probs.unflatten(-1, (-1, PAGE_TOKENS)).movedim(3, 1).flatten(0, 1)  # [N, H, M, 128]
    by_page = by_page * codec.value_units(pages, layout).unsqueeze(-1)
    scale, centre = codec.value_grid(pages, layout)  # [N, H, V, 128]
    scale = scale.unsqueeze(-2)
    zero = centre - scale.squeeze(-2) * codec.grid_middle(layout.config.value_bits)
    scaled = by_page.unsqueeze(2) * scale  # [N, H, V, M, 128]
    # plane p holds tokens 16 p .. 16 p + 15: its unit goes into their weights
    scaled = scaled * _plane_units(TILE, scaled.device)
    words = layout.field(pages, "value_codes")  # [N, H, sets, blocks, 16 channels, 16 tokens]
    output = probs.new_zeros(())
    for index in range(words.shape[2]):
        rows = words[:, :, index].flatten(2, 3)[:, :, : layout.value_dim]
        # Repeated first and masked in one go: rows of 16 words are short for a CPU.
        rows = rows.unsqueeze(3).expand(-1, -1, -1, PLANES, -1).flatten(3)
        masks = _plane_masks(rows.device).repeat_interleave(TILE)
        codes = (rows & masks).view(torch.uint16).float()  # [N, H, E, 128]
        codes = codes.unflatten(2, (-1, layout.value_group))
        output = output + scaled @ codes.mT * 4**index  # [N, H, V, M, value_group]
    output = output + (by_page @ zero.mT).mT.unsqueeze(-1)
    output = output.transpose(2, 3).flatten(3)  # [N, H, M, E]
    return output.unflatten(0, (batch, -1)).sum(1)


@lru_cache(maxsize=8)
def _plane_masks(device: torch.device) -> Tensor:
    masks = [3 << 2 * plane for plane in range(PLANES)]
    with torch.inference_mode(False):
        return torch.tensor(masks, dtype=torch.int32, device=device).to(torch.int16)


@lru_cache(maxsize=32)
def _plane_units(rows_per_plane: int, device: torch.device) -> Tensor:
    """``4**-plane`` for each of ``8 * rows_per_plane`` rows."""
    with torch.inference_mode(False):
        powers = 0.25 ** torch.arange(PLANES, device=device, dtype=torch.float32)
        return powers.repeat_interleave(rows_per_plane)
