"""Which backend runs an operation, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from oscar_kv.kernels import reference
from oscar_kv.kernels.masking import Visibility
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV

ENVIRONMENT_VARIABLE = "OSCAR_KV_BACKEND"


class Operations(Protocol):
    """What a backend module provides; :mod:`oscar_kv.kernels.reference` defines the meaning."""

    def pack(self, keys: Tensor, values: Tensor, layout: PageLayout) -> Tensor: ...

    def unpack(
        self, pages: Tensor, layout: PageLayout, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...

    def append(
        self, packed: PackedKV, keys: Tensor, values: Tensor, lengths: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]: ...

    def attend(
        self,
        query: Tensor,
        packed: PackedKV,
        new_keys: Tensor | None,
        new_values: Tensor | None,
        scaling: float,
        softcap: float | None,
        s_aux: Tensor | None,
        visibility: Visibility,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A named implementation of :class:`Operations`.

    Attributes:
        unsupported: why this backend cannot serve a layout on a device, ``None`` if it can.
    """

    name: str
    operations: Operations
    unsupported: Callable[[PageLayout, torch.device], str | None]


# In order of preference; the reference takes everything and comes last.
BACKENDS: tuple[Backend, ...] = (
    Backend("reference", cast(Operations, reference), lambda layout, device: None),
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
