"""Which backend runs an operation, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from oscar_kv.kernels import cuda_decode, cuda_driver
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV

ENVIRONMENT_VARIABLE = "OSCAR_KV_BACKEND"


class Operations(Protocol):
    """What a backend module provides; :mod:`oscar_kv.kernels.reference` defines the meaning."""

    def pack_into(
        self,
        pool: Tensor,
        page_ids: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: PageLayout,
        *,
        pages: int,
    ) -> None: ...

    def unpack(
        self, pages: Tensor, layout: PageLayout, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...

    def append(
        self, packed: PackedKV, keys: Tensor, values: Tensor, lengths: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]: ...

    def attend(self, call: AttentionCall) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A named implementation of :class:`Operations`.

    Attributes:
        module: the module with the operations, imported when it is first needed.
        unsupported: why this backend cannot serve a layout on a device, ``None`` if it can.
    """

    name: str
    module: str
    unsupported: Callable[[PageLayout, torch.device], str | None]

    @cached_property
    def operations(self) -> Operations:
        return cast(Operations, import_module(self.module))


def _not_for_triton(layout: PageLayout, device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get(ENVIRONMENT_VARIABLE) == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "on a CPU it needs TRITON_INTERPRET=1"
    elif device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, not {device.type}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 or more"
    for name, channels in (("head_dim", layout.head_dim), ("value_head_dim", layout.value_dim)):
        if channels % 16 or channels > 256:
            return f"{name}={channels}: takes multiples of 16 up to 256"
    return None


def _not_for_cuda(layout: PageLayout, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, not {device.type}"
    return (
        _not_for_triton(layout, device)
        or cuda_driver.missing(device)
        or cuda_decode.unsupported(layout)
    )


# In order of preference; the reference takes everything and comes last.
BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", "oscar_kv.kernels.cuda_backend", _not_for_cuda),
    Backend("triton", "oscar_kv.kernels.triton_backend", _not_for_triton),
    Backend("reference", "oscar_kv.kernels.reference", lambda layout, device: None),
)


def choose(layout: PageLayout, device: torch.device) -> tuple[Backend, str]:
    """The backend for pages of ``layout`` on ``device``, and the reason in words.

    Raises:
        ValueError: if ``OSCAR_KV_BACKEND`` names no backend, or one that cannot serve this.
    """
    names = [backend.name for backend in BACKENDS]
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        if forced not in names:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r}: expected one of {names}")
        backend = BACKENDS[names.index(forced)]
        if problem := backend.unsupported(layout, device):
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r}: {problem}")
        return backend, f"{forced}: asked for by {ENVIRONMENT_VARIABLE}"
    passed_over = []
    for backend in BACKENDS:
        problem = backend.unsupported(layout, device)
        if problem is None:
            return backend, "; ".join([*passed_over, f"{backend.name}: serves this"])
        passed_over.append(f"{backend.name}: {problem}")
    raise AssertionError("unreachable: the reference backend serves everything")
