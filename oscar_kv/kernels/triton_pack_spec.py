"""What the kernels that write pages are compiled with, and the rotations they read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from oscar_kv.core.rotation import factor, rotation_matrix
from oscar_kv.kernels.triton_page import PageSpec, page_spec
from oscar_kv.storage.layout import PageLayout


@dataclass(frozen=True)
class PackSpec:
    """How the pages of a layout are filled: constants of a kernel beside its :class:`PageSpec`."""

    page: PageSpec
    unbiased: bool
    refit_scale: bool
    """Whether token scales are corrected so that ``<k, k_hat> = <k, k>``."""
    exponent: float
    """Of the norm in the token scale; 0 is no scale."""
    key_unit: float
    """The rotation is this times its signs."""
    value_unit: float

    @property
    def key_width(self) -> int:
        """Rows of a rotated key tile: channels, padded to a power of two."""
        return triton.next_power_of_2(self.page.head_dim)

    @property
    def group_width(self) -> int:
        """Columns of a value group, padded to a power of two."""
        return triton.next_power_of_2(self.page.value_group)

    @property
    def groups_width(self) -> int:
        """Value groups, padded to a power of two."""
        return triton.next_power_of_2(self.page.value_groups)

    @property
    def value_width(self) -> int:
        """Columns of a rotated value tile: the padded groups side by side."""
        return self.group_width * self.groups_width

    @property
    def padded(self) -> bool:
        """Whether some columns of a value tile are no channel."""
        return self.value_width != self.page.value_dim

    @property
    def num_warps(self) -> int:
        return 4 if max(self.key_width, self.value_width) <= 128 else 8


@lru_cache(maxsize=64)
def pack_spec(layout: PageLayout) -> PackSpec:
    """The constants of ``layout``."""
    config = layout.config
    return PackSpec(
        page=page_spec(layout),
        unbiased=config.fit == "unbiased",
        refit_scale=config.fit == "unbiased" and config.token_scale == "per_head",
        exponent=0.0 if config.token_scale == "none" else float(config.token_scale_exponent),
        key_unit=_sign_unit(layout.head_dim),
        value_unit=_sign_unit(layout.value_dim),
    )


def supports(layout: PageLayout) -> bool:
    """Whether :func:`write_page` can write pages of ``layout``.

    Not if ``fit="unbiased"`` has to correct scales that heads share: that takes all heads at once.
    """
    return layout.config.fit == "minmax" or layout.config.token_scale != "cross_head"


def _sign_unit(channels: int) -> float:
    _, base, sylvester = factor(channels)
    return (base * sylvester) ** -0.5


@lru_cache(maxsize=64)
def signs(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Signs (-1, 0, 1: exact in every dtype) of the rotations of keys and values.

    Returns:
        ``[tile columns, channels]``, both padded with zeros to powers of two: one row for each
        row of a rotated key tile, and for each column of a rotated value tile.
    """
    spec = pack_spec(layout)
    keys = torch.zeros(spec.key_width, spec.key_width)
    keys[: layout.head_dim, : layout.head_dim] = rotation_matrix(layout.head_dim).T.sign()
    values = torch.zeros(
        spec.groups_width, spec.group_width, triton.next_power_of_2(layout.value_dim)
    )
    by_group = rotation_matrix(layout.value_dim).T.sign().unflatten(0, (-1, layout.value_group))
    values[: by_group.shape[0], : by_group.shape[1], : layout.value_dim] = by_group
    return keys.to(device, dtype), values.flatten(0, 1).to(device, dtype)
