"""What the kernels compile to stays within bounds, for GPUs that are not at hand.

A change that costs a kernel registers, shared memory or instructions passes every other test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent


class Budget(NamedTuple):
    """The most a kernel may take; see ``measure`` in ``compile_only.py``."""

    registers: int
    shared: int
    loops: tuple[tuple[int, int], ...] = ()
    spills: int = 0


def page_loop(slots: float, head_dim: int) -> int:
    """Instructions for a page if 512 codes may take ``slots``; it has ``2 * 128 * head_dim``."""
    return int(slots * head_dim / 2)


def cuda_decode(slots: float, head_dim: int, team: int, shared: int) -> Budget:
    """The same codes in CUDA C++, where ``team`` warps take a page; ``shared`` is in KiB.

    There are two blocks of 128 threads on an SM, with 255 registers each.
    """
    beside_pages = ((310, 0), (235, 0), (235, 0), (165, 0))
    return Budget(255, shared << 10, ((page_loop(slots / team, head_dim), 0), *beside_pages))


def cuda_pack(instructions: int, shared: int) -> Budget:
    """A page of a warp in CUDA C++, where 16 warps of an SM have 128 registers each.

    What spills are mostly addresses that do not change: stored once, fetched again for every page.
    """
    return Budget(128, shared << 10, ((instructions, 60),), 25)


# A little above what Triton 3.6 and 3.9 compile, whichever is more. They protect
# - of decode, the instructions per code, which bound its speed wherever memory does not, and the
#   programs that fit on an SM: 168 registers are twelve, and shared memory is the scarcer one;
# - of decode in CUDA C++, which NVRTC 13.0 compiles, the same, and that two blocks fit on an SM
#   (113 KiB each on sm_90, 81 KiB on sm_80) or at least one (163 KiB on sm_80);
# - of pack in CUDA C++, the instructions, and two blocks of head size 128 on an SM of sm_90 or one
#   on sm_80, four or three of 64;
# - of extend, two programs per SM (228 KiB on sm_90, 164 KiB on sm_80), and its loops over pages
#   with and without hidden tokens, and over full-precision tokens;
# - of pack and append, which have 255 registers, that no more of them spill;
# - of what rotates and combines, the time before and after the kernel that counts.
COMBINE_128 = Budget(128, 2048, ((540, 0), (520, 0)))
BUDGETS = {
    90: {
        "decode compact 128: decode_part": Budget(168, 22000, ((page_loop(26, 128), 8),), 32),
        "decode compact 128: combine_parts": COMBINE_128,
        "decode quality 128: decode_part": Budget(168, 29000, ((page_loop(37, 128), 22),), 48),
        "decode quality 128: combine_parts": COMBINE_128,
        "decode paper 128: decode_part": Budget(168, 34000, ((page_loop(38, 128), 46),), 70),
        "decode paper 128: combine_parts": COMBINE_128,
        "decode high 128: decode_part": Budget(168, 29500, ((page_loop(32.5, 128), 8),), 36),
        "decode high 128: combine_parts": COMBINE_128,
        "decode compact 64: decode_part": Budget(168, 12000, ((page_loop(33.5, 64), 0),), 4),
        "decode compact 64: combine_parts": Budget(80, 1024, ((300, 0), (290, 0))),
        "decode compact 96: rotate_kernel": Budget(144, 65536),
        "decode compact 96: decode_part": Budget(168, 16000, ((page_loop(28, 96), 2),), 20),
        "decode compact 96: combine_parts": Budget(240, 2048, ((840, 0), (840, 0)), 8),
        "pack compact 128: pack_kernel": Budget(255, 65536, (), 115),
        "append compact 128: append_kernel": Budget(255, 65536, (), 110),
        "extend compact 128: rotate_kernel": Budget(144, 65536),
        "extend compact 128: extend_kernel": Budget(
            255, 114688, ((1620, 32), (1050, 4), (700, 4)), 145
        ),
        "unpack compact 128: unpack_kernel": Budget(184, 49152, ((1200, 0), (1020, 0)), 4),
        "rows compact 128: locate_kernel": Budget(48, 0),
        "rows compact 128: open_kernel": Budget(96, 0),
        "rows compact 128: close_kernel": Budget(48, 0),
        "rows compact 96: locate_kernel": Budget(48, 0),
        "rows compact 96: open_kernel": Budget(96, 0),
        "rows compact 96: close_kernel": Budget(48, 0),
        "CUDA decode compact 128: team of 1": cuda_decode(27, 128, 1, 113),
        "CUDA decode compact 128: team of 2": cuda_decode(35.5, 128, 2, 113),
        "CUDA decode compact 128: team of 4": cuda_decode(48, 128, 4, 113),
        "CUDA decode quality 128: team of 1": cuda_decode(33.5, 128, 1, 113),
        "CUDA decode quality 128: team of 2": cuda_decode(39.5, 128, 2, 113),
        "CUDA decode quality 128: team of 4": cuda_decode(47.5, 128, 4, 113),
        "CUDA decode paper 128: team of 1": cuda_decode(37.5, 128, 1, 113),
        "CUDA decode paper 128: team of 2": cuda_decode(44.5, 128, 2, 113),
        "CUDA decode paper 128: team of 4": cuda_decode(52, 128, 4, 113),
        "CUDA decode high 128: team of 1": cuda_decode(33, 128, 1, 113),
        "CUDA decode high 128: team of 2": cuda_decode(42.5, 128, 2, 113),
        "CUDA decode high 128: team of 4": cuda_decode(57, 128, 4, 113),
        "CUDA decode compact 64: team of 1": cuda_decode(40.5, 64, 1, 113),
        "CUDA decode compact 128: team of 1, streamed": cuda_decode(27, 128, 1, 113),
        "CUDA pack compact 128": cuda_pack(2440, 83),
        "CUDA pack quality 128": cuda_pack(2390, 84),
        "CUDA pack high 128": cuda_pack(2600, 87),
        "CUDA pack compact 64": cuda_pack(2720, 45),
        "CUDA combine 64": Budget(64, 3072, ((180, 0),)),
        "CUDA combine 128": Budget(64, 5120, ((230, 0),)),
        "CUDA combine 128, streamed": Budget(64, 5120, ((230, 0),)),
    },
    80: {
        "decode compact 128: decode_part": Budget(168, 22000, ((page_loop(30, 128), 0),), 8),
        "decode compact 128: combine_parts": Budget(168, 2048, ((540, 0), (520, 0))),
        "pack compact 128: pack_kernel": Budget(255, 36864, (), 680),
        "append compact 128: append_kernel": Budget(255, 36864, (), 610),
        "extend compact 128: rotate_kernel": Budget(255, 65536),
        "extend compact 128: extend_kernel": Budget(
            255, 81920, ((3400, 130), (2940, 110), (1060, 40)), 390
        ),
        "CUDA decode compact 128: team of 1": cuda_decode(30.5, 128, 1, 81),
        "CUDA decode compact 128: team of 2": cuda_decode(40, 128, 2, 81),
        "CUDA decode compact 128: team of 4": cuda_decode(56.5, 128, 4, 81),
        "CUDA decode quality 128: team of 1": cuda_decode(43, 128, 1, 81),
        "CUDA decode quality 128: team of 2": cuda_decode(49, 128, 2, 81),
        "CUDA decode quality 128: team of 4": cuda_decode(56.5, 128, 4, 81),
        "CUDA decode paper 128: team of 1": cuda_decode(37, 128, 1, 163),
        "CUDA decode paper 128: team of 2": cuda_decode(44, 128, 2, 81),
        "CUDA decode paper 128: team of 4": cuda_decode(51.5, 128, 4, 81),
        "CUDA decode high 128: team of 1": cuda_decode(36, 128, 1, 163),
        "CUDA decode high 128: team of 2": cuda_decode(47.5, 128, 2, 81),
        "CUDA decode high 128: team of 4": cuda_decode(65.5, 128, 4, 81),
        "CUDA decode compact 64: team of 1": cuda_decode(44.5, 64, 1, 81),
        "CUDA decode compact 128: team of 1, streamed": cuda_decode(30.5, 128, 1, 81),
        "CUDA pack compact 128": cuda_pack(2690, 83),
        "CUDA pack quality 128": cuda_pack(2640, 84),
        "CUDA pack high 128": cuda_pack(2870, 87),
        "CUDA pack compact 64": cuda_pack(2910, 45),
        "CUDA combine 64": Budget(64, 3072, ((180, 0),)),
        "CUDA combine 128": Budget(64, 5120, ((230, 0),)),
        "CUDA combine 128, streamed": Budget(64, 5120, ((230, 0),)),
    },
}


def test_kernels_compile_within_their_budgets():
    running = [_compile(arch) for arch in BUDGETS]
    outputs = [process.communicate() for process in running]
    excesses = []
    for arch, process, (output, errors) in zip(BUDGETS, running, outputs):
        assert process.returncode == 0, errors
        measured = json.loads(output)
        assert measured.keys() == BUDGETS[arch].keys()
        excesses += [
            f"sm_{arch} {name}: {figures} is more than {BUDGETS[arch][name]}"
            for name, figures in measured.items()
            if not _within(figures, BUDGETS[arch][name])
        ]
    assert not excesses, "\n".join(excesses)


def _compile(arch: int) -> subprocess.Popen[str]:
    environment = {name: x for name, x in os.environ.items() if not name.startswith("TRITON_")}
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [environment.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "tests/compile_only.py", str(arch)],
        cwd=TESTS.parent,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _within(figures: dict, budget: Budget) -> bool:
    loops = [tuple(loop) for loop in figures["loops"]]
    return (
        all(figures[name] <= getattr(budget, name) for name in ("registers", "shared", "spills"))
        and len(loops) <= len(budget.loops)
        and all(a <= b and c <= d for (a, c), (b, d) in zip(loops, budget.loops))
    )
