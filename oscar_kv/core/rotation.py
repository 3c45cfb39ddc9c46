"""Canalized Rotation: an orthonormal Hadamard rotation of the head dimension (paper, section 4).

``K' = K R`` and ``Q' = Q R`` leave every logit unchanged, because ``R R^T = I``, and spread a
channel outlier over all channels. A head_dim that is a power of two uses Sylvester's matrix;
others use the Kronecker product of a Paley matrix (order 12, 20, 28, 36, ...) with it, or, where
no such product exists, blocks of the largest factor that has one.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor


def rotate(x: Tensor) -> Tensor:
    """``x R`` over the last dimension.

    Args:
        x: floating-point ``[..., D]``.

    Returns:
        The rotated tensor, same shape and dtype.
    """
    return x @ _rotation_like(x)


def rotate_back(x: Tensor) -> Tensor:
    """``x R^T`` over the last dimension: undoes :func:`rotate`."""
    return x @ _rotation_like(x).T


def fast_rotate(x: Tensor) -> Tensor:
    """:func:`rotate` in O(D log D) operations, by the fast Walsh-Hadamard transform.

    The form that a kernel without matrix units uses; on a CPU the product in :func:`rotate` is
    faster.
    """
    head_dim = x.shape[-1]
    blocks, base, sylvester = factor(head_dim)
    y = x.reshape(-1, blocks, base, sylvester)
    with torch.inference_mode(False), torch.device("cpu"):
        hadamard = _base_hadamard(base)
    y = torch.einsum("nbik,ij->nbjk", y, hadamard.to(y))
    width = 1
    while width < sylvester:
        pairs = y.reshape(*y.shape[:3], sylvester // (2 * width), 2, width)
        y = torch.cat(
            [pairs[..., :1, :] + pairs[..., 1:, :], pairs[..., :1, :] - pairs[..., 1:, :]], dim=-2
        ).reshape(*y.shape)
        width *= 2
    return (y * (base * sylvester) ** -0.5).reshape(x.shape)


@lru_cache(maxsize=32)
def rotation_matrix(
    head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """The orthonormal ``R`` ``[D, D]`` of this ``head_dim``. Cached: do not write to it.

    Raises:
        ValueError: if ``head_dim`` is not a positive integer.
    """
    blocks, base, sylvester = factor(head_dim)
    # Cached for the process, so independent of the mode and default device of the first caller.
    with torch.inference_mode(False), torch.device("cpu"):
        block = torch.kron(_base_hadamard(base), _sylvester(sylvester))
        matrix = torch.block_diag(*[block] * blocks) * (base * sylvester) ** -0.5
        return matrix.to(dtype=dtype, device=device)


@lru_cache(maxsize=32)
def rotation_factors(head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """``R`` as a Kronecker product of two small matrices, the second of order 16 at most.

    Two short products instead of one long one: a kernel's way to rotate a single row.

    Returns:
        float32 ``[a, a]`` and ``[b, b]`` with ``R = kron(first, second)``. Cached: do not write.
    """
    blocks, base, sylvester = factor(head_dim)
    inner = min(sylvester, 16)
    with torch.inference_mode(False), torch.device("cpu"):
        outer = torch.kron(_base_hadamard(base), _sylvester(sylvester // inner))
        outer = torch.block_diag(*[outer] * blocks) * (base * sylvester) ** -0.5
        return outer.float().to(device), _sylvester(inner).float().to(device)


def _rotation_like(x: Tensor) -> Tensor:
    return rotation_matrix(x.shape[-1], x.dtype, x.device)


@cache
def factor(head_dim: int) -> tuple[int, int, int]:
    """``(blocks, base, sylvester)`` with ``head_dim = blocks * base * sylvester``.

    ``base`` is 1 or the order of a Paley matrix, ``sylvester`` a power of two, and ``blocks`` the
    number of diagonal blocks, 1 wherever one Hadamard matrix covers the whole head.
    """
    if not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim={head_dim!r}: expected a positive integer")
    for size in (s for s in range(head_dim, 0, -1) if head_dim % s == 0):
        for base in (b for b in (1, 12, 20, 28, 36, 44, 60) if size % b == 0):
            sylvester = size // base
            if sylvester & (sylvester - 1) == 0:
                return head_dim // size, base, sylvester
    raise AssertionError("unreachable: a block of size 1 always exists")


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


@cache
def _base_hadamard(order: int) -> Tensor:
    """Order 1, or Paley's construction I (order q + 1) or II (order 2 q + 2) for a prime q."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if (q := order - 1) % 4 == 3 and _is_prime(q):
        border = torch.ones(order, order, dtype=torch.float64)
        border[1:, 0] = -1
        border[1:, 1:] = _residues(q)
        border[0, 0] = 0
        return border + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _residues(q)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(
        torch.eye(q + 1, dtype=torch.float64), diagonal
    )


def _residues(q: int) -> Tensor:
    """Jacobsthal matrix ``[q, q]``: the quadratic character of ``i - j`` modulo the prime q."""
    squares = {(i * i) % q for i in range(1, q)}
    character = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]
    return torch.tensor(
        [[character[(i - j) % q] for j in range(q)] for i in range(q)], dtype=torch.float64
    )


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
