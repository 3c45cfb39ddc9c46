"""Operations on packed pages. Every call is checked here and handed to one backend.

:func:`~oscar_kv.kernels.dispatch.choose` says which backend and why; the environment variable
``OSCAR_KV_BACKEND`` overrides it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from oscar_kv.config import OscarConfig
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.dispatch import Operations, choose
from oscar_kv.kernels.masking import Visibility
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.ownership import without_autocast
from oscar_kv.storage.packed import PackedKV
from oscar_kv.storage.paged import PagedSequences

DECODE_QUERIES = 16
"""The most new tokens per sequence that :func:`decode_attention` takes."""


@contextmanager
def _operations(layout: PageLayout, device: torch.device) -> Iterator[Operations]:
    """The backend for pages of ``layout``, with the device current on which kernels start."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), without_autocast():
        yield choose(layout, device)[0].operations


def pack(keys: Tensor, values: Tensor, layout: PageLayout) -> Tensor:
    """Rotates, scales, fits and packs whole pages.

    Args:
        keys: ``[N, H, 128, D]`` after RoPE, unrotated.
        values: ``[N, H, 128, E]``, unrotated.
        layout: the page layout.

    Returns:
        uint8 ``[N, H, page_bytes]``.
    """
    shape = (keys.shape[0], layout.num_kv_heads, layout.page_bytes)
    pages = torch.empty(shape, dtype=torch.uint8, device=keys.device)
    ids = torch.arange(keys.shape[0], dtype=torch.int32, device=keys.device)
    with _operations(layout, keys.device) as operations:
        operations.pack_into(pages, ids, keys, values, layout, pages=1)
    return pages


def pack_into(
    pool: Tensor, page_ids: Tensor, keys: Tensor, values: Tensor, layout: PageLayout
) -> None:
    """Packs tokens into pages of an engine's pool. Nothing waits for the device.

    Args:
        pool: uint8 ``[capacity, H, page_bytes]``, contiguous.
        page_ids: int32 ``[N]``, where each page goes; one with a negative id is left out.
        keys: ``[N, H, 128, D]`` after RoPE, unrotated. A token with NaN or Inf is stored as zeros.
        values: ``[N, H, 128, E]``, unrotated.
        layout: the page layout.
    """
    with _operations(layout, pool.device) as operations:
        operations.pack_into(pool, page_ids, keys, values, layout, pages=1)


def unpack(
    pages: Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The keys ``[N, H, 128, D]`` and values ``[N, H, 128, E]`` that ``pages`` stand for."""
    with _operations(layout, pages.device) as operations:
        return operations.unpack(pages, layout, dtype)


def append(
    packed: PackedKV, keys: Tensor, values: Tensor, *, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Appends new tokens to every sequence; all as :meth:`PackedKV.append`."""
    with _operations(packed.layout, packed.device) as operations:
        return operations.append(packed, keys, values, lengths)


def quantize(
    keys: Tensor,
    values: Tensor,
    config: OscarConfig | None = None,
    *,
    lengths: Sequence[int] | None = None,
) -> PackedKV:
    """Quantizes the keys and values of one attention layer.

    Args:
        keys: ``[B, H, T, D]`` after RoPE; float16, bfloat16 or float32.
        values: ``[B, H, T, E]``, the same dtype.
        config: ``OscarConfig.compact()`` if omitted.
        lengths: tokens of each sequence, where fewer than T, counted from the left.

    Returns:
        The packed sequences; ``.nbytes`` and ``.memory()`` say how large they are.

    Raises:
        ValueError, TypeError: as :class:`PackedKV` and its ``append``.
    """
    for name, states in (("keys", keys), ("values", values)):
        if not isinstance(states, Tensor) or states.ndim != 4:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"{name}={shape}: expected a tensor [B, H, T, channels]")
    packed = PackedKV(
        OscarConfig() if config is None else config,
        batch_size=keys.shape[0],
        num_kv_heads=keys.shape[1],
        head_dim=keys.shape[3],
        value_head_dim=None if values.shape[3] == keys.shape[3] else values.shape[3],
        dtype=keys.dtype,
        device=keys.device,
    )
    append(packed, keys, values, lengths=lengths)
    return packed


def dequantize(packed: PackedKV, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """All keys and values of ``packed`` in the original basis; see :meth:`PackedKV.dense`."""
    return packed.dense(dtype)


def decode_attention(
    query: Tensor,
    packed: PackedKV,
    *,
    scaling: float | None = None,
    starts: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of the 1..16 newest tokens of each sequence, straight from packed pages.

    Arguments, result and errors of :func:`extend_attention`, which takes more queries.
    """
    if query.ndim == 4 and query.shape[2] > DECODE_QUERIES:
        raise ValueError(
            f"query holds {query.shape[2]} tokens per sequence: decode_attention takes at most "
            f"{DECODE_QUERIES}; use extend_attention"
        )
    return extend_attention(
        query,
        packed,
        scaling=scaling,
        starts=starts,
        sliding_window=sliding_window,
        softcap=softcap,
        s_aux=s_aux,
        mask=mask,
    )


def extend_attention(
    query: Tensor,
    packed: PackedKV,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
    *,
    scaling: float | None = None,
    starts: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest ``Tq`` tokens of each sequence over all of ``packed``.

    ``packed`` already holds the new tokens. Query ``i`` of sequence ``b`` sits at position
    ``packed.lengths[b] - Tq + i``; one before the start of its sequence sees nothing.

    Args:
        query: ``[B, Hq, Tq, D]``, after RoPE, unrotated; ``Hq`` a multiple of the KV heads.
        packed: the sequences, new tokens included.
        new_keys: ``[B, H, Tq, D]``: the new tokens' exact keys. With many new tokens some are
            in packed pages already; given these, the queries see them exactly.
        new_values: ``[B, H, Tq, E]``, with ``new_keys``.
        scaling: logit factor, ``D ** -0.5`` if omitted.
        starts: int ``[B]``, first visible position of each sequence (left padding).
        sliding_window: how many newest positions a query sees, itself included.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        s_aux: ``[Hq]`` attention-sink logits that join the softmax and carry no value.
        mask: bool (True = visible) or additive, broadcastable to ``[B, Hq, Tq, T]`` with
            ``T >= packed.max_length``; it then replaces causality and ``starts``.

    Returns:
        ``[B, Hq, Tq, E]`` in the dtype of ``query``. A query that may see nothing gets zeros.

    Raises:
        ValueError: for shapes that do not fit ``packed``, or more queries than tokens.
        TypeError: for a query, mask, batch or new tokens of the wrong type.
    """
    if not isinstance(packed, PackedKV):
        raise TypeError(f"packed is a {type(packed).__name__}: expected a PackedKV")
    layout = packed.layout
    _check_query(query, packed)
    if (new_keys is None) != (new_values is None):
        raise ValueError("new_keys and new_values: expected both or neither")
    shape = (packed.batch_size, layout.num_kv_heads, query.shape[2])
    for name, states, channels in (
        ("new_keys", new_keys, layout.head_dim),
        ("new_values", new_values, layout.value_dim),
    ):
        if states is not None and tuple(states.shape) != (*shape, channels):
            raise ValueError(f"{name}={tuple(states.shape)}: expected {(*shape, channels)}")
        if states is not None and (states.dtype, states.device) != (packed.dtype, packed.device):
            raise TypeError(
                f"{name} is {states.dtype} on {states.device}: packed holds {packed.dtype} on "
                f"{packed.device}"
            )
    if s_aux is not None and tuple(s_aux.shape) != (query.shape[1],):
        raise ValueError(f"s_aux={tuple(s_aux.shape)}: expected {(query.shape[1],)}")
    if starts is not None and (
        tuple(starts.shape) != (packed.batch_size,) or starts.is_floating_point()
    ):
        expected = (packed.batch_size,)
        raise ValueError(f"starts={tuple(starts.shape)} {starts.dtype}: expected int {expected}")
    if new_keys is not None and query.shape[2] > min(packed.lengths):
        raise ValueError(f"new_keys: more tokens than the shortest sequence, {min(packed.lengths)}")
    if sliding_window is not None and (not isinstance(sliding_window, int) or sliding_window < 1):
        raise ValueError(f"sliding_window={sliding_window}: expected a positive integer")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: expected a positive number")
    if mask is not None:
        _check_mask(mask, query, packed)
    for name, given in (("starts", starts), ("s_aux", s_aux), ("mask", mask)):
        if given is not None and given.device != packed.device:
            raise ValueError(f"{name} is on {given.device}: packed is on {packed.device}")
    starts, s_aux = (None if x is None else x.contiguous() for x in (starts, s_aux))
    with _operations(layout, packed.device) as operations:
        return operations.attend(
            AttentionCall(
                query,
                packed,
                Visibility(query.shape[2], starts, sliding_window, mask),
                layout.head_dim**-0.5 if scaling is None else scaling,
                new_keys,
                new_values,
                softcap,
                s_aux,
            )
        )


def attend_paged(
    query: Tensor,
    sequences: PagedSequences,
    *,
    scaling: float,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`extend_attention` over an engine's pages; on a GPU nothing waits for the device.

    The engine vouches for its lengths: queries that it does not have sit before the first token of
    the tail, and what comes out for them means nothing.

    Args:
        query: ``[B, Hq, Tq, D]``; the newest ``Tq`` tokens of each sequence lie in its tail.
        sequences: new tokens included.
        scaling, softcap: as there.
        out: where the result goes, contiguous; a new tensor if omitted.

    Returns:
        ``[B, Hq, Tq, E]`` in the dtype of ``query``.
    """
    with _operations(sequences.layout, sequences.device) as operations:
        visibility = Visibility(query.shape[2])
        call = AttentionCall(query, sequences, visibility, scaling, softcap=softcap, out=out)
        return operations.attend(call)


def _check_query(query: Tensor, packed: PackedKV) -> None:
    layout = packed.layout
    if not query.is_floating_point():
        raise TypeError(f"query is {query.dtype}: expected floating point")
    if (
        query.ndim != 4
        or query.shape[0] != packed.batch_size
        or query.shape[1] % layout.num_kv_heads
        or query.shape[3] != layout.head_dim
    ):
        raise ValueError(
            f"query={tuple(query.shape)}: expected [B, Hq, Tq, D] = [{packed.batch_size}, a "
            f"multiple of {layout.num_kv_heads}, Tq, {layout.head_dim}]"
        )
    if query.device != packed.device:
        raise ValueError(f"query is on {query.device}: packed is on {packed.device}")
    if not 1 <= query.shape[2] <= packed.max_length:
        raise ValueError(
            f"query holds {query.shape[2]} tokens per sequence: expected 1 to "
            f"{packed.max_length}, the tokens of the longest sequence"
        )


def _check_mask(mask: Tensor, query: Tensor, packed: PackedKV) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask is {mask.dtype}: expected bool (True = visible) or additive floats")
    batch, num_heads, num_queries, _ = query.shape
    wanted = (batch, num_heads, num_queries)
    if (
        mask.ndim != 4
        or any(size not in (1, full) for size, full in zip(mask.shape, wanted))
        or mask.shape[3] < packed.max_length
    ):
        raise ValueError(
            f"mask={tuple(mask.shape)}: expected something broadcastable to {list(wanted)} x "
            f"at least {packed.max_length} positions"
        )
