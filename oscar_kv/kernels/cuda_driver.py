"""CUDA sources to kernels, with what a CUDA build of PyTorch brings: NVRTC and the driver.

No toolkit and no C++ compiler is needed, and nothing is built when the package is installed. A
kernel is compiled for the device it runs on, when it is first launched.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch

from oscar_kv.kernels.device import capability

SOURCES = Path(__file__).parent / "cuda"

_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int64), ("value", ctypes.c_int64 * 8))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Program:
    """A kernel of ``cuda/<name>.cu``, also called ``name``, whose argument is a structure."""

    name: str
    constants: tuple[tuple[str, object], ...]
    """What the preprocessor defines."""
    threads: int
    """Of a block."""
    shared_memory: int
    """Bytes of a block."""


class Run(Protocol):
    """Runs ``blocks`` blocks of a program on a device; the argument is copied."""

    def __call__(
        self, program: Program, argument: ctypes.Structure, blocks: int, device: torch.device, /
    ) -> None: ...


def run(program: Program, argument: ctypes.Structure, blocks: int, device: torch.device, /) -> None:
    """:class:`Run` on the current stream of a GPU, which has to be the current device.

    Compiles the program when it first sees it.
    """
    # From Hopper on a kernel starts while the one before it ends, and waits for that itself.
    early = _Attribute(id=_PROGRAMMATIC_LAUNCH)
    early.value[0] = 1
    launch = _Launch(
        grid=(blocks, 1, 1),
        block=(program.threads, 1, 1),
        shared_memory=program.shared_memory,
        stream=torch.cuda.current_stream(device).cuda_stream,
        attributes=ctypes.pointer(early),
        num_attributes=int(capability(device) >= (9, 0)),
    )
    pointer = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    _bind(device)
    function = _load(program, device)
    _check(_driver().cuLaunchKernelEx(ctypes.byref(launch), function, pointer, None))


@lru_cache(maxsize=512)
def _load(program: Program, device: torch.device) -> ctypes.c_void_p:
    cubin = compile_program(program, architecture(device))
    driver = _driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), cubin))
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, program.name.encode()))
    _check(driver.cuFuncSetAttribute(function, _DYNAMIC_SHARED_MEMORY, program.shared_memory))
    return function


def architecture(device: torch.device) -> str:
    """What NVRTC calls a device's instruction set, ``"sm_90"`` for example."""
    major, minor = capability(device)
    return f"sm_{major}{minor}"


def _bind(device: torch.device) -> None:
    """Gives a thread the device's context if it has none yet; PyTorch may not have had to."""
    driver, context = _driver(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.index or 0))
        _check(driver.cuCtxSetCurrent(context))


def compile_program(program: Program, architecture: str) -> bytes:
    """Compiles a program; needs no GPU.

    Args:
        architecture: ``"sm_90"``, say.

    Returns:
        A cubin.

    Raises:
        RuntimeError: with the compiler's words, if it fails.
    """
    nvrtc = _nvrtc()
    name = f"{program.name}.cu"
    headers = sorted(SOURCES.glob("*.cuh"))
    handle = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(handle),
        (SOURCES / name).read_bytes(),
        name.encode(),
        len(headers),
        (ctypes.c_char_p * len(headers))(*(header.read_bytes() for header in headers)),
        (ctypes.c_char_p * len(headers))(*(header.name.encode() for header in headers)),
    )
    if created:
        raise RuntimeError(f"NVRTC does not start: error {created}")
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in program.constants]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if nvrtc.nvrtcCompileProgram(handle, len(options), encoded):
            log = _read(nvrtc, "ProgramLog", handle).rstrip(b"\0").decode()
            raise RuntimeError(
                f"{name} does not compile for {architecture} (OSCAR_KV_BACKEND=triton does without "
                f"it):\n{log}"
            )
        return _read(nvrtc, "CUBIN", handle)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))


@lru_cache(maxsize=8)
@lru_cache(maxsize=8)
def missing(device: torch.device) -> str | None:
    """What :func:`compile_program` lacks to compile for a device, ``None`` if nothing."""
    if torch.version.cuda is None:
        return "PyTorch has no CUDA build"
    try:
        nvrtc = _nvrtc()
    except OSError as error:
        return str(error)
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    wanted = architecture(device)
    return None if wanted in {f"sm_{one}" for one in known} else f"NVRTC does not know {wanted}"


def _read(nvrtc: ctypes.CDLL, what: str, handle: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(handle, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(handle, buffer)
    return buffer.raw


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    """The compiler that PyTorch itself uses; of any installed one without a CUDA build."""
    major = (torch.version.cuda or "*").split(".")[0]
    for folder in sys.path:
        for library in sorted(Path(folder or ".").glob(f"nvidia/*/lib/libnvrtc.so.{major}")):
            for part in sorted(library.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(part))  # NVRTC would not find it here
            return ctypes.CDLL(str(library))
    return ctypes.CDLL(f"libnvrtc.so.{major}")


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")
