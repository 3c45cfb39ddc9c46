"""The CUDA kernels on a CPU: their sources, compiled by g++ against ``tests/emulator``."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from oscar_kv.kernels import cuda_decode, cuda_pack
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.cuda_driver import SOURCES, Program
from oscar_kv.storage.layout import PageLayout

COMPILER = shutil.which("g++")
EMULATOR = Path(__file__).parent / "emulator"


def decode(call: AttentionCall, work: cuda_decode.Plan | None = None) -> Tensor:
    """:func:`oscar_kv.kernels.cuda_decode.decode` on a CPU."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # empty tensors, for kernels to fill, are full of NaN
    try:
        return cuda_decode.decode(call, work, run)
    finally:
        torch.use_deterministic_algorithms(before)


def pack_into(
    pool: Tensor,
    page_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PageLayout,
    *,
    pages: int,
) -> None:
    """:func:`oscar_kv.kernels.cuda_pack.pack_into` on a CPU."""
    cuda_pack.pack_into(pool, page_ids, keys, values, layout, pages=pages, run=run)


def run(program: Program, argument: ctypes.Structure, blocks: int, *_: object) -> None:
    """:class:`oscar_kv.kernels.cuda_driver.Run` on a CPU.

    Raises:
        RuntimeError: for a mistake that the emulator notices.
    """
    emulate = build(program.name, program.constants).emulate
    emulate.restype = ctypes.c_char_p
    mistake = emulate(ctypes.byref(argument), blocks, program.threads, program.shared_memory)
    if mistake:
        raise RuntimeError(f"{program.name}: {mistake.decode()}")


@lru_cache(maxsize=256)
def build(
    name: str, constants: tuple[tuple[str, object], ...], sources: Path = SOURCES
) -> ctypes.CDLL:
    """``emulator/emulate.cpp`` with the kernel of ``<sources>/<name>.cu``."""
    with tempfile.TemporaryDirectory(prefix="oscar_kv_emulated_") as folder:
        target = f"{folder}/{name}.so"
        subprocess.run(
            [
                str(COMPILER), "-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-unknown-pragmas",
                f"-I{EMULATOR}", f"-I{sources}", f'-DSOURCE="{name}.cu"', f"-DKERNEL={name}",
                *(f"-D{key}={value}" for key, value in constants),
                str(EMULATOR / "emulate.cpp"), "-o", target,
            ],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(target)
