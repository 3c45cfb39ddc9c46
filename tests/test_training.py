"""``tools/training.py``: what does not need a training run."""

from __future__ import annotations

import pytest

from tools.training import wanted_first_token


@pytest.mark.parametrize("final", [0.25, 0.5])
def test_norm_wanted_of_the_first_token(final: float) -> None:
    """Like the others' for half of the training, then straight down, then ``final``."""
    assert [wanted_first_token(progress, final) for progress in (0.0, 0.3, 0.5)] == [1, 1, 1]
    for progress, way in ((0.6, 0.25), (0.7, 0.5), (0.8, 0.75), (0.9, 1.0)):
        assert wanted_first_token(progress, final) == pytest.approx(1 - way * (1 - final))
    assert [wanted_first_token(progress, final) for progress in (0.95, 1.0)] == [final, final]
