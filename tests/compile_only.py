"""Compiles the kernels that matter, without a GPU, and prints what the compiler made of them.

    python tests/compile_only.py 90

The Triton backend's own functions launch them, on tensors that lie in CPU memory; a driver without
a device has every launch compile its kernel for the architecture and leave it at that. In a process
of its own: Triton's interpreter has to be off before a kernel is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from oscar_kv import OscarConfig
from oscar_kv.config import PRESETS
from oscar_kv.integrations.vllm import triton_rows
from oscar_kv.integrations.vllm.rows import Ring, group_rows
from oscar_kv.kernels import triton_backend as backend
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.cuda_decode import combine_program, decode_program
from oscar_kv.kernels.cuda_driver import Program, compile_program
from oscar_kv.kernels.cuda_pack import pack_program
from oscar_kv.kernels.masking import Visibility
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV

MULTIPROCESSORS = {80: 108, 90: 132}
SEQUENCES, QUERY_HEADS, KV_HEADS = 2, 32, 8
TOKENS = 4136  # 31 or 32 pages and a tail
FEWEST_INSTRUCTIONS = 100  # of a loop that is worth a line

CASES = {
    80: [
        ("decode", "compact", 128),
        ("pack", "compact", 128),
        ("append", "compact", 128),
        ("extend", "compact", 128),
    ],
    90: [
        ("decode", "compact", 128),
        ("decode", "quality", 128),
        ("decode", "paper", 128),
        ("decode", "high", 128),
        ("decode", "compact", 64),
        ("decode", "compact", 96),
        ("pack", "compact", 128),
        ("append", "compact", 128),
        ("extend", "compact", 128),
        ("unpack", "compact", 128),
        ("rows", "compact", 128),
        ("rows", "compact", 96),
    ],
}

CUDA_CASES = [  # preset, head size, warps that share a page, whether blocks share all work
    *((preset, 128, team, False) for preset in PRESETS for team in (1, 2, 4)),
    ("compact", 64, 1, False),
    ("compact", 128, 1, True),
]
CUDA_PACK_CASES = [("compact", 128), ("quality", 128), ("high", 128), ("compact", 64)]


class Driver:
    """What the JIT asks a driver for up to the launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(arch: int) -> dict[str, dict[str, Any]]:
    """Figures of each kernel of ``CASES[arch]``, by operation, preset, head size and name."""
    launches: list[tuple[str, Any]] = []
    compile_or_launch = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        compiled = compile_or_launch(self, *args, warmup=True, **options)
        launches.append((self.__name__.lstrip("_"), compiled))

    JITFunction.run = run
    driver.set_active(Driver(arch))  # pyright: ignore[reportArgumentType]
    _pretend_device(capability=divmod(arch, 10), multiprocessors=MULTIPROCESSORS[arch])
    report = {}
    for operation, preset, head_dim in CASES[arch]:
        launches.clear()
        _launch(operation, preset, head_dim)
        for name, compiled in launches:
            figures = measure(compiled.asm["cubin"], compiled.metadata.shared)
            if name == "decode_part":  # one warp, a page at a time
                instructions, _ = figures["loops"][0]
                figures["slots_per_512_codes"] = round(instructions / (head_dim / 2), 1)
            report[f"{operation} {preset} {head_dim}: {name}"] = figures
    return report


def compile_cuda(arch: int) -> dict[str, dict[str, Any]]:
    """Likewise for the kernels in CUDA C++."""

    def compile_and_measure(program: Program) -> dict[str, Any]:
        return measure(compile_program(program, f"sm_{arch}"), program.shared_memory)

    report = {}
    for preset, head_dim, team, streamed in CUDA_CASES:
        layout = PageLayout(OscarConfig.preset(preset), head_dim, KV_HEADS)
        figures = compile_and_measure(decode_program(layout, torch.bfloat16, team, streamed))
        instructions, _ = figures["loops"][0]  # of a warp, for its share of a page
        figures["slots_per_512_codes"] = round(team * instructions / (head_dim / 2), 1)
        kind = ", streamed" if streamed else ""
        report[f"CUDA decode {preset} {head_dim}: team of {team}{kind}"] = figures
    for preset, head_dim in CUDA_PACK_CASES:
        layout = PageLayout(OscarConfig.preset(preset), head_dim, KV_HEADS)
        program = pack_program(layout, torch.bfloat16)
        report[f"CUDA pack {preset} {head_dim}"] = compile_and_measure(program)
    for value_dim, streamed in ((64, False), (128, False), (128, True)):
        program = combine_program(value_dim, torch.bfloat16, streamed)
        kind = ", streamed" if streamed else ""
        report[f"CUDA combine {value_dim}{kind}"] = compile_and_measure(program)
    return report


def measure(cubin: bytes, shared: int) -> dict[str, Any]:
    """What a compiled kernel takes.

    ``shared`` is in bytes. ``loops`` has a pair for each loop worth the name, largest first: its
    instructions, and those of them that spill registers or fetch them back. ``spills`` are the
    ones outside of these loops.
    """
    code = _disassemble(cubin, "--dump-resource-usage", "-sass")
    registers = re.search(r"REG:(\d+)", code)
    assert registers, code
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    sass = {int(address, 16): instruction for address, instruction in found}
    spills = {address for address, text in sass.items() if re.search(r"\b(STL|LDL)\b", text)}
    loops = _loops(sass)
    return {
        "registers": int(registers[1]),
        "shared": shared,
        "loops": [(len(loop), len(spills & loop)) for loop in loops],
        "spills": len(spills.difference(*loops)),
    }


def _loops(sass: dict[int, str]) -> list[set[int]]:
    """Addresses in the bodies of backward branches, largest first.

    Without code moved behind the end, and without loops around loops.
    """
    loops = []
    for address, instruction in sass.items():
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)
        if branch:
            body = {at for at in sass if int(branch[1], 16) <= at <= address}
            if len(body) >= FEWEST_INSTRUCTIONS and not any("EXIT" in sass[at] for at in body):
                loops.append(body)
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    return sorted(innermost, key=len, reverse=True)


def _disassemble(cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _pretend_device(**answers: object) -> None:
    """Replaces the functions of the kernels' modules that ask a device what it is."""
    missing = set(answers)
    for module in [m for name, m in sys.modules.items() if name.startswith("oscar_kv.kernels.")]:
        for name in vars(module).copy():
            if name.lstrip("_") in answers:
                answer = answers[name.lstrip("_")]
                setattr(module, name, lambda device, answer=answer: answer)
                missing.discard(name.lstrip("_"))
    assert not missing, f"no function of the kernels' modules is called {missing}"


def _launch(operation: str, preset: str, head_dim: int) -> None:
    if operation == "rows":
        return _launch_rows(head_dim)
    config = OscarConfig.preset(preset)

    def states(heads: int, tokens: int) -> Tensor:
        return torch.zeros(SEQUENCES, heads, tokens, head_dim, dtype=torch.bfloat16)

    packed = PackedKV(
        config,
        batch_size=SEQUENCES,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        dtype=torch.bfloat16,
    )
    prompt, token = states(KV_HEADS, TOKENS), states(KV_HEADS, 1)
    packed.append(prompt, prompt, pack=lambda *_, **__: None)
    if operation == "pack":
        backend.append(packed, prompt, prompt)
    elif operation == "append":
        backend.append(packed, token, token)
    elif operation == "unpack":
        backend.unpack(packed.pool.data, packed.layout, torch.bfloat16)
    else:
        queries = {"decode": 1, "extend": 512}[operation]
        visible = Visibility(queries)
        query = states(QUERY_HEADS, queries)
        backend.attend(AttentionCall(query, packed, visible, head_dim**-0.5))


def _launch_rows(head_dim: int) -> None:
    """What an engine's decode step does with rows."""
    numbers = torch.zeros(SEQUENCES + 1, 64, dtype=torch.int32)
    begins, lengths, table = numbers[:, 0], numbers[:SEQUENCES, 0], numbers[:SEQUENCES]
    states = torch.zeros(TOKENS, QUERY_HEADS + 2 * KV_HEADS, head_dim, dtype=torch.bfloat16)
    query, keys, values = states.split((QUERY_HEADS, KV_HEADS, KV_HEADS), 1)
    ring = Ring(torch.zeros(9, KV_HEADS, 16, 2 * head_dim, dtype=torch.bfloat16), table, 8)
    for rows in group_rows([1] * SEQUENCES, 64, torch.device("cpu")):
        triton_rows.locate(rows, begins, lengths, table)
        queries, _, _ = triton_rows.open_rows(rows, query, keys, values, ring)
        triton_rows.close_rows(rows, queries, query)


if __name__ == "__main__":
    # A folder of its own: what is measured is what the compiler at hand makes of the kernels.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        arch = int(sys.argv[1])
        print(json.dumps(compile_for(arch) | compile_cuda(arch), indent=2))
