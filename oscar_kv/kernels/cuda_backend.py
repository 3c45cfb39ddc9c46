"""The CUDA backend: attention of a few new tokens in CUDA C++, everything else in Triton."""

from __future__ import annotations

from torch import Tensor

from oscar_kv.kernels import cuda_decode, triton_backend
from oscar_kv.kernels.masking import Visibility
from oscar_kv.kernels.triton_backend import append, pack_into, unpack
from oscar_kv.storage.packed import PackedKV

__all__ = ["append", "attend", "pack_into", "unpack"]


def attend(
    query: Tensor,
    packed: PackedKV,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
    visibility: Visibility,
) -> Tensor:
    """See :func:`oscar_kv.kernels.reference.attend`."""
    here = cuda_decode.takes(query, packed, visibility)
    attend = cuda_decode.decode if here else triton_backend.attend
    return attend(query, packed, new_keys, new_values, scaling, softcap, s_aux, visibility)
