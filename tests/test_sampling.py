"""Tokens are drawn with the probabilities that were asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oscar_kv.sampling import Sampler, greedy

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def drawn(sampler: Sampler, count: int = 20_000) -> Tensor:
    """How often each token was drawn ``[V]``."""
    ids = sampler(PROBABILITIES.log().expand(count, -1))
    assert ids.shape == (count, 1)
    return torch.bincount(ids[:, 0], minlength=5) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        # the squares, by hand: 0.01, 0.16, 0.0025, 0.0625, 0.04 of 0.275
        ({"temperature": 0.5}, [0.0364, 0.5818, 0.0091, 0.2273, 0.1455]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"temperature": 1.0, "top_k": 50}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.4}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e30}, [0.2] * 5),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_probabilities(options: dict[str, float], expected: list[float]) -> None:
    found = drawn(Sampler(**options))  # pyright: ignore
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=0.015, rtol=0)


def test_a_seed_repeats_the_draws_and_leaves_those_of_others() -> None:
    logits = PROBABILITIES.log().expand(200, -1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, other = (Sampler(1.0, seed=seed) for seed in (7, 7, 8))
    first = one(logits)
    assert torch.equal(first, same(logits))
    assert not torch.equal(first, one(logits))  # the next draw is another
    assert not torch.equal(first, other(logits))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(Sampler(1.0)(logits), Sampler(1.0)(logits))


def test_the_most_likely_token() -> None:
    logits = torch.randn(3, 9)
    assert greedy(logits).tolist() == [[row.argmax().item()] for row in logits]
    assert torch.equal(Sampler(0.0, seed=1)(logits), greedy(logits))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p=nan"),
        ({"top_p": 0.9}, "set a temperature"),
        ({"top_k": 5}, "set a temperature"),
    ],
)
def test_refusals(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampler(**options)  # pyright: ignore
