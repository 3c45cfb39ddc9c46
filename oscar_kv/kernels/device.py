"""What the host code of kernels asks about a device; zeros and ones on a CPU, for the tests."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """How many SMs there are."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of an SM."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@lru_cache(maxsize=8)
def block_shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block can have."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
