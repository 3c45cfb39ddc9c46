"""Shared settings: one thread per worker (they run side by side), and calm hypothesis runs.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before they are
imported.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random data in every run of a test, whatever ran before it."""
    torch.manual_seed(0)
