"""``pack`` in CUDA C++: the host side of ``cuda/pack.cu``.

The same pages as :mod:`~oscar_kv.kernels.triton_pack` writes, for what most models need: see
:func:`unsupported` and :func:`takes`. Triton does the rest.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.core.grid import SHARE_OF_RANGE, STEP_OVER_DEVIATION
from oscar_kv.core.scaling import REFIT_LIMITS
from oscar_kv.kernels.cuda_driver import Program, Run, run
from oscar_kv.kernels.device import multiprocessors, shared_memory
from oscar_kv.storage.codec import UNIT_RANGE, VALUE_PEAK
from oscar_kv.storage.layout import TILE, PageLayout

_REGISTERS_OF_WARPS = 16  # warps of an SM that have 128 registers a thread
_RESERVED_SHARED_MEMORY = 1024  # of every block, by the hardware


class PackArguments(ctypes.Structure):
    """``struct Arguments`` of ``pack.cu``."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("page_ids", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("pages", ctypes.c_int),
        ("count", ctypes.c_int),
        ("blocks", ctypes.c_int),
    )


def unsupported(layout: PageLayout) -> str | None:
    """Why the kernel cannot write pages of ``layout``, ``None`` if it can."""
    config = layout.config
    for name, channels in (("head_dim", layout.head_dim), ("value_head_dim", layout.value_dim)):
        if channels not in (64, 128):
            return f"{name}={channels}: takes 64 and 128"
    if layout.value_group != layout.value_dim:
        return f"value_group={layout.value_group}: takes whole heads"
    for name, taken in (
        ("fit", "unbiased"),
        ("metadata", "fp8"),
        ("token_scale", "per_head"),
        ("token_scale_exponent", 1),
    ):
        if getattr(config, name) != taken:
            return f"{name}={getattr(config, name)!r}: takes {taken!r}"
    return None


def takes(keys: Tensor, values: Tensor, layout: PageLayout) -> bool:
    """Whether the kernel packs these: 16 bits, rows where 16 bytes can be copied at once."""
    return (
        unsupported(layout) is None
        and keys.dtype in (torch.float16, torch.bfloat16)
        and keys.dtype == values.dtype
        and all(
            x.stride(3) == 1 and x.data_ptr() % 16 == 0 and not any(s % 8 for s in x.stride()[:3])
            for x in (keys, values)
        )
    )


@lru_cache(maxsize=256)
def pack_program(layout: PageLayout, dtype: torch.dtype) -> Program:
    """The kernel; its constants come from the one definition of a page."""
    config = layout.config
    warps = layout.head_dim // TILE
    rows = sum(2 * channels + 16 for channels in (layout.head_dim, layout.value_dim))
    # States, the page, and float32: for a token one of each warp and three more, and the peaks.
    floats = PAGE_TOKENS * (warps + 3) + PAGE_TOKENS // TILE
    memory = PAGE_TOKENS * rows + layout.page_bytes + 4 * floats
    constants = {
        "HEADS": layout.num_kv_heads,
        "HEAD_DIM": layout.head_dim,
        "VALUE_DIM": layout.value_dim,
        "KEY_SETS": config.key_bits // 2,
        "VALUE_SETS": config.value_bits // 2,
        "KEY_GROUP": config.key_group,
        "PAGE_BYTES": layout.page_bytes,
        **{name.upper(): field.offset for name, field in layout.fields.items()},
        "BFLOAT": int(dtype == torch.bfloat16),
        "ROTATION_UNIT": f"{layout.head_dim**-0.5!r}f",
        "VALUE_ROTATION_UNIT": f"{layout.value_dim**-0.5!r}f",
        "VALUE_PEAK": f"{VALUE_PEAK!r}f",
        "VALUE_UNIT_RANGE": int(math.log2(UNIT_RANGE[1])),
        "STEP_OVER_DEVIATION": f"{STEP_OVER_DEVIATION!r}f",
        "SHARE_OF_RANGE": f"{SHARE_OF_RANGE!r}f",
        "REFIT_LOW": f"{REFIT_LIMITS[0]!r}f",
        "REFIT_HIGH": f"{REFIT_LIMITS[1]!r}f",
        "SHARED_BYTES": memory,
        "BLOCKS_PER_SM": _REGISTERS_OF_WARPS // warps,
    }
    return Program("pack", tuple(constants.items()), 32 * warps, memory)


def pack_into(
    pool: Tensor,
    page_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PageLayout,
    *,
    pages: int,
    run: Run = run,
) -> None:
    """:func:`oscar_kv.storage.codec.encode_into`, for what :func:`takes` says.

    Args:
        run: runs a program; on a GPU unless a test brings another.
    """
    count = keys.shape[0] * pages * layout.num_kv_heads
    if not count:
        return
    program, device = pack_program(layout, keys.dtype), keys.device
    together = min(
        _REGISTERS_OF_WARPS * 32 // program.threads,
        shared_memory(device) // (program.shared_memory + _RESERVED_SHARED_MEMORY),
    )
    blocks = min(count, max(1, together) * multiprocessors(device))
    argument = PackArguments(
        pool=pool.data_ptr(),
        page_ids=page_ids.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        key_strides=(ctypes.c_int64 * 3)(*keys.stride()[:3]),
        value_strides=(ctypes.c_int64 * 3)(*values.stride()[:3]),
        pages=pages,
        count=count,
        blocks=blocks,
    )
    run(program, argument, blocks, device)
