"""The emulator of a GPU notices what would be a mistake on one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import emulated
import pytest
import torch


class Copied(ctypes.Structure):
    """``struct Arguments`` of the kernel below."""

    _fields_ = (("source", ctypes.c_void_p), ("target", ctypes.c_void_p))


REVERSE = """
#include <warp.cuh>
struct Arguments { const u32* source; u32* target; };
extern "C" __global__ void reverse(const __grid_constant__ Arguments a) {
  wait_for_previous_grid();
  u8* memory = shared_memory();
  copy_async(memory + 16 * thread(), a.source + 4 * thread());
  commit_copies();
  WAIT;
  SYNC;
  a.target[thread()] = load<1>(memory + 16 * (63 - thread())).at[0];
}
"""


@pytest.mark.skipif(emulated.COMPILER is None, reason="the emulator is compiled by g++")
@pytest.mark.parametrize(
    ("wait", "sync", "memory", "mistake"),
    [
        ("wait_for_copies<0>()", "sync_block()", 1024, None),
        ("wait_for_copies<1>()", "sync_block()", 1024, "wrong"),
        ("wait_for_copies<0>()", "sync_warp()", 1024, "wrong"),
        ("wait_for_copies<0>()", "if(thread()<9)sync_block()", 1024, "never reach"),
        ("wait_for_copies<0>()", "sync_block()", 1000, "beyond"),
    ],
)
def test_the_emulator_notices_mistakes(
    tmp_path: Path, wait: str, sync: str, memory: int, mistake: str | None
) -> None:
    (tmp_path / "reverse.cu").write_text(REVERSE)
    kernel = emulated.build("reverse", (("WAIT", wait), ("SYNC", sync)), tmp_path)
    kernel.emulate.restype = ctypes.c_char_p
    source = torch.arange(256, dtype=torch.int32)
    target = torch.zeros(64, dtype=torch.int32)
    argument = Copied(source=source.data_ptr(), target=target.data_ptr())
    found = kernel.emulate(ctypes.byref(argument), 1, 64, memory)
    if found is None and not torch.equal(target, source[::4].flip(0)):
        found = b"wrong"
    assert found is None if mistake is None else found is not None and mistake in found.decode()
