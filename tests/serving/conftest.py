"""A real vLLM engine on this CPU: ``make test-vllm``, in an environment of its own."""

from __future__ import annotations

import os

# One thread per process: the engine binds threads to cores, which other tests may be using.
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
