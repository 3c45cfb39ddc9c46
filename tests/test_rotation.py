"""The Hadamard rotation."""

from __future__ import annotations

import pytest
import torch

from oscar_kv.core.rotation import factor, fast_rotate, rotate, rotate_back, rotation_matrix

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 576)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_one_orthonormal_hadamard_matrix(head_dim: int) -> None:
    matrix = rotation_matrix(head_dim, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, head_dim**-0.5))
    assert factor(head_dim)[0] == 1


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 72, 100, 104])
def test_fast_and_matrix_form_agree_and_are_undone(head_dim: int) -> None:
    x = torch.randn(3, 5, head_dim, dtype=torch.float64)
    torch.testing.assert_close(fast_rotate(x), rotate(x))
    torch.testing.assert_close(rotate_back(rotate(x)), x)


def test_logits_are_unchanged() -> None:
    query, keys = torch.randn(7, 80, dtype=torch.float64), torch.randn(9, 80, dtype=torch.float64)
    torch.testing.assert_close(rotate(query) @ rotate(keys).T, query @ keys.T)


def test_a_channel_outlier_is_spread() -> None:
    x = torch.randn(1000, 128)
    x[:, 3] *= 30
    assert rotate(x).std(0).max() < 0.3 * x.std(0).max()


def test_a_head_without_hadamard_matrix_is_rotated_in_blocks() -> None:
    assert factor(104) == (13, 1, 8)
    matrix = rotation_matrix(104, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(104, dtype=torch.float64))


def test_the_first_caller_leaves_no_trace() -> None:
    """Whatever mode or default device it ran in, the cached matrix is an ordinary one."""
    rotation_matrix.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        rotation_matrix(96, device=torch.device("cpu"))
    x = torch.randn(2, 96, requires_grad=True)
    rotate(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("head_dim", [0, -8, 1.5])
def test_bad_head_dim(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        rotation_matrix(head_dim)
