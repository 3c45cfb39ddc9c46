"""The CUDA backend: packing and attention of a few new tokens in CUDA C++, where that serves, and
everything else in Triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from oscar_kv.kernels import cuda_decode, cuda_pack, triton_backend
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.triton_backend import unpack
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV

__all__ = ["append", "attend", "pack_into", "unpack"]


def pack_into(
    pool: Tensor,
    page_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PageLayout,
    *,
    pages: int,
) -> None:
    """See :func:`oscar_kv.storage.codec.encode_into`."""
    backend = cuda_pack if cuda_pack.takes(keys, values, layout) else triton_backend
    backend.pack_into(pool, page_ids, keys, values, layout, pages=pages)


def append(
    packed: PackedKV, keys: Tensor, values: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`oscar_kv.kernels.append`."""
    return triton_backend.append(packed, keys, values, lengths, pack=pack_into)


def attend(call: AttentionCall) -> Tensor:
    """See :func:`oscar_kv.kernels.reference.attend`."""
    return cuda_decode.decode(call) if cuda_decode.takes(call) else triton_backend.attend(call)
