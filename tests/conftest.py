"""Shared settings: one thread per worker (they run side by side), and calm hypothesis runs."""

from __future__ import annotations

import pytest
import torch
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
