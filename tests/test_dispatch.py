"""Which backend runs, and why."""

from __future__ import annotations

import pytest
import torch

from oscar_kv import OscarConfig
from oscar_kv.kernels.dispatch import choose
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
