"""The Triton backend: every operation of :mod:`oscar_kv.kernels.reference` in GPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from oscar_kv.kernels import triton_append
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.triton_decode import decode
from oscar_kv.kernels.triton_extend import extend
from oscar_kv.kernels.triton_pack import pack_into
from oscar_kv.kernels.triton_pack_spec import supports
from oscar_kv.kernels.triton_unpack import unpack
from oscar_kv.storage.packed import PackedKV
from oscar_kv.storage.write import PackFunction

__all__ = ["append", "attend", "pack_into", "unpack"]

# Query rows of one KV head up to which the codes are attended as they are; from there on it is
# cheaper to dequantize a page once for all rows.
_FEW_ROWS = 32


def append(
    packed: PackedKV,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int] | None = None,
    pack: PackFunction = pack_into,
) -> tuple[Tensor, Tensor]:
    """See :func:`oscar_kv.kernels.append`: one launch for a few tokens, packing for many."""
    few = keys.ndim == 4 and keys.shape[2] <= triton_append.MOST_NEW_TOKENS
    if few and supports(packed.layout):
        return packed.append_step(keys, values, append_step, lengths=lengths)
    return packed.append(keys, values, lengths=lengths, pack=pack)


def attend(call: AttentionCall) -> Tensor:
    """See :func:`oscar_kv.kernels.reference.attend`."""
    return decode(call) if call.rows <= _FEW_ROWS else extend(call)


def append_step(packed: PackedKV, keys: Tensor, values: Tensor, counts: Tensor | None) -> None:
    """The kernel's step for :meth:`PackedKV.append_step`."""
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    triton_append.append(
        keys,
        values,
        counts,
        layout=packed.layout,
        tail_keys=packed.tail_keys,
        tail_values=packed.tail_values,
        sink_keys=packed.sink_keys,
        sink_values=packed.sink_values,
        tail_lengths=packed.tail_lengths,
        sink_lengths=packed.sink_lengths,
        page_counts=packed.page_counts,
        block_table=packed.block_table,
        pool=packed.page_data,
        arrivals=packed.arrivals,
        nonfinite=packed.nonfinite,
    )
