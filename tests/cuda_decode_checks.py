"""What the tests of decode attention in CUDA C++ share: a comparison with the oracle, and configs.

Without a GPU the kernels are emulated (``emulated.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import emulated
import kernel_checks
import pytest
from kernel_checks import GPU
from torch import Tensor

from oscar_kv import OscarConfig, PackedKV
from oscar_kv.config import PRESETS
from oscar_kv.kernels import cuda_decode
from oscar_kv.kernels.cuda_decode import DENSE_TOKENS, Plan, unsupported
from oscar_kv.storage.layout import PageLayout

needs_compiler = pytest.mark.skipif(
    not GPU and emulated.COMPILER is None, reason="the emulator of a GPU is compiled by g++"
)
decode = cuda_decode.decode if GPU else emulated.decode

CONFIGS = {
    **{preset: OscarConfig.preset(preset) for preset in PRESETS},
    "4-bit values": OscarConfig(value_bits=4, key_group=16, value_group=16, token_scale="none"),
    "fp16": OscarConfig(key_bits=4, value_bits=4, key_group=64, value_group=32, metadata="fp16"),
}
CHANNELS = [
    channels
    for channels in ((64, None), (128, None), (256, None), (64, 128), (128, 64), (256, 128))
    if unsupported(PageLayout(OscarConfig(), channels[0], 2, channels[1])) is None
]


class Division(NamedTuple):
    """A :class:`Plan` without the dense parts, which packed states determine."""

    team: int = 1
    page_parts: int = 2
    dense_apart: bool = False
    streamed: int = 0


def check(
    packed: PackedKV, group: int, tokens: int, division: Division | None, **options: Any
) -> Tensor:
    """As :func:`kernel_checks.check`; ``None`` leaves the division to the host code."""
    work = None
    if division is not None:
        new = tokens if options.get("fresh") else 0
        dense = (packed.most_tail_tokens, packed.config.sink_tokens, new)
        parts = sum(-(-count // DENSE_TOKENS) for count in dense)
        work = Plan(
            division.team,
            0 if division.streamed else division.page_parts,
            parts,
            division.dense_apart,
            division.streamed,
        )
    return kernel_checks.check(partial(decode, work=work), packed, group, tokens, **options)
