"""The CUDA backend: attention of a few new tokens in CUDA C++, everything else in Triton."""

from __future__ import annotations

from torch import Tensor

from oscar_kv.kernels import cuda_decode, triton_backend
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.triton_backend import append, pack_into, unpack

__all__ = ["append", "attend", "pack_into", "unpack"]


def attend(call: AttentionCall) -> Tensor:
    """See :func:`oscar_kv.kernels.reference.attend`."""
    return cuda_decode.decode(call) if cuda_decode.takes(call) else triton_backend.attend(call)
