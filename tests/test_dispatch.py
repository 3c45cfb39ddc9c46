"""Which backend runs, and why."""

from __future__ import annotations

import pytest
import torch

from oscar_kv import OscarConfig
from oscar_kv.kernels import dispatch
from oscar_kv.kernels.dispatch import BACKENDS, Backend, choose
from oscar_kv.storage.layout import PageLayout

LAYOUT = PageLayout(OscarConfig.compact(), 64, 2)
CPU = torch.device("cpu")


def test_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSCAR_KV_BACKEND", raising=False)
    backend, reason = choose(LAYOUT, CPU)
    assert backend.name == "reference"
    assert "reference" in reason


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSCAR_KV_BACKEND", "reference")
    assert "OSCAR_KV_BACKEND" in choose(LAYOUT, CPU)[1]
    monkeypatch.setenv("OSCAR_KV_BACKEND", "abacus")
    with pytest.raises(ValueError, match="OSCAR_KV_BACKEND='abacus'"):
        choose(LAYOUT, CPU)


def test_a_backend_that_declines_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Backend("picky", BACKENDS[0].module, lambda layout, device: "only on Sundays")
    eager = Backend("eager", BACKENDS[0].module, lambda layout, device: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (picky, eager, *BACKENDS))
    monkeypatch.delenv("OSCAR_KV_BACKEND", raising=False)
    backend, reason = choose(LAYOUT, CPU)
    assert backend is eager
    assert reason == "picky: only on Sundays; eager: serves this"
    monkeypatch.setenv("OSCAR_KV_BACKEND", "picky")
    with pytest.raises(ValueError, match="only on Sundays"):
        choose(LAYOUT, CPU)


def test_cuda_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSCAR_KV_BACKEND", raising=False)
    assert "cuda: needs an NVIDIA GPU, not cpu; " in choose(LAYOUT, CPU)[1]
    monkeypatch.setenv("OSCAR_KV_BACKEND", "cuda")
    with pytest.raises(ValueError, match="OSCAR_KV_BACKEND='cuda': needs an NVIDIA GPU, not cpu"):
        choose(LAYOUT, CPU)
