"""What every ``pack`` has to fulfil: its pages, read with :mod:`oscar_kv.storage.codec`, against
what a page means."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE
from states import slope, states
from torch import Tensor

from oscar_kv import OscarConfig
from oscar_kv.storage import codec
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.write import PackFunction


def page_states(
    kind: str, pages: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages, on the device."""
    keys, _ = states(kind, pages, heads, 128, key_dim)
    _, values = states(kind, pages, heads, 128, value_dim, seed=1)
    return keys.to(DEVICE, dtype), values.to(DEVICE, dtype)


def pack(pack_into: PackFunction, keys: Tensor, values: Tensor, layout: PageLayout) -> Tensor:
    """The pages of ``[N, H, 128, channels]``."""
    shape = (keys.shape[0], layout.num_kv_heads, layout.page_bytes)
    pages = torch.full(shape, 255, dtype=torch.uint8, device=keys.device)
    ids = torch.arange(keys.shape[0], dtype=torch.int32, device=keys.device)
    pack_into(pages, ids, keys, values, layout, pages=1)
    return pages


def relative_error(read: Tensor, exact: Tensor) -> float:
    return float((read - exact).norm() / exact.norm())


def check_quality(
    pack_into: PackFunction, keys: Tensor, values: Tensor, layout: PageLayout
) -> None:
    """Codes, and what is read, are as those of the reference."""
    pages, expected = (
        pack(pack_into, keys, values, layout),
        codec.encode_pages(keys, values, layout),
    )
    for codes in (codec.key_codes, codec.value_codes):
        same = (codes(pages, layout) == codes(expected, layout)).float().mean()
        assert same > 0.99
    decoded = codec.decode_pages(pages, layout, torch.float64)
    references = codec.decode_pages(expected, layout, torch.float64)
    for read, reference, given in zip(decoded, references, (keys, values)):
        exact = given.double()
        assert relative_error(read, exact) <= 1.01 * relative_error(reference, exact)
        if layout.config.fit == "unbiased":
            assert slope(read, exact) == pytest.approx(1, abs=0.03)  # of a few thousand numbers


def check_unbiased(pack_into: PackFunction, kind: str, bits: int, dtype: torch.dtype) -> None:
    """Reading is unbiased, and every code is used."""
    layout = PageLayout(OscarConfig(key_bits=bits, value_bits=bits), 64, 2)
    keys, values = page_states(kind, 6, 2, 64, 64, dtype)
    pages = pack(pack_into, keys, values, layout)
    read_keys, read_values = codec.decode_pages(pages, layout, torch.float64)
    product = (keys.double() * read_keys).sum(-1) / keys.double().square().sum(-1)
    limits = 2.0**-10  # the token scale is a float16
    clipped = (product - 1).abs() > limits
    assert clipped.float().mean() < 0.01  # the refit may not double a scale
    assert slope(read_values, values) == pytest.approx(1, abs=0.02)
    assert codec.key_codes(pages, layout).unique().tolist() == list(range(2**bits))
    assert codec.value_codes(pages, layout).unique().tolist() == list(range(2**bits))


def check_zero_tokens(
    pack_into: PackFunction, layout: PageLayout, rows: slice, dtype: torch.dtype
) -> None:
    """Tokens of zeros read as zeros."""
    keys, values = page_states("gaussian", 1, 2, layout.head_dim, layout.value_dim, dtype)
    keys[:, :, rows], values[:, :, rows] = 0, 0
    for read in codec.decode_pages(pack(pack_into, keys, values, layout), layout):
        assert read.isfinite().all()
        assert not read[:, :, rows].any()


def check_not_finite(
    pack_into: PackFunction, layout: PageLayout, number: float, channel: int, dtype: torch.dtype
) -> None:
    """A token that is not finite is stored as zeros, and spoils no other."""
    keys, values = page_states("gaussian", 1, 2, layout.head_dim, layout.value_dim, dtype)
    cleaned_keys, cleaned_values = keys.clone(), values.clone()
    for states_, head, token in ((keys, 0, 3), (values, 1, 90), (values, 0, 127)):
        states_[0, head, token, channel] = number
        cleaned_keys[0, head, token], cleaned_values[0, head, token] = 0, 0
    read = codec.decode_pages(pack(pack_into, keys, values, layout), layout)
    cleaned = pack(pack_into, cleaned_keys, cleaned_values, layout)
    for found, wanted in zip(read, codec.decode_pages(cleaned, layout)):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not read[1][0, 0, 3].any()
    assert not read[1][0, 1, 90].any()
    if layout.config.token_scale == "per_head":  # the paper's scale is that of all heads
        assert not read[0][0, 1, 90].any()


def check_prompt(pack_into: PackFunction, head_dim: int, dtype: torch.dtype) -> None:
    """Pages of a prompt go straight into a pool."""
    layout = PageLayout(OscarConfig.compact(), head_dim, 2)
    prompt = torch.randn(2, 128 * 3 + 20, 2, 2, head_dim, device=DEVICE, dtype=dtype)
    # [B, H, T, D], nothing but channels contiguous
    keys, values = prompt.permute(3, 0, 2, 1, 4)
    pool = torch.full((7, 2, layout.page_bytes), 255, dtype=torch.uint8, device=DEVICE)
    ids = torch.tensor([6, 1, 0, 4], dtype=torch.int32, device=DEVICE)
    pack_into(pool, ids, keys[:, :, 9:], values[:, :, 9:], layout, pages=2)
    for number, page in enumerate(ids.tolist()):
        sequence, first = number // 2, 9 + number % 2 * 128
        there = (sequence, slice(None), slice(first, first + 128))
        expected = codec.encode_pages(keys[there][None], values[there][None], layout)
        for read, wanted in zip(
            codec.decode_pages(pool[page][None], layout), codec.decode_pages(expected, layout)
        ):
            assert relative_error(read, wanted) < 0.05
    assert (pool[[2, 3, 5]] == 255).all()


def check_left_out(pack_into: PackFunction, head_dim: int, dtype: torch.dtype) -> None:
    """Pages without a place are not written, and the others are what they are without these."""
    layout = PageLayout(OscarConfig.compact(), head_dim, 2)
    keys, values = torch.randn(2, 11, 2, 128, head_dim, device=DEVICE, dtype=dtype)
    ids = torch.tensor([-1, 6, -1, -1, 0, 4, -1, 3, -1, -1, -1], dtype=torch.int32, device=DEVICE)
    pool, expected = (
        torch.full((8, 2, layout.page_bytes), 255, dtype=torch.uint8, device=DEVICE)
        for _ in range(2)
    )
    pack_into(pool, ids, keys, values, layout, pages=1)
    placed = ids >= 0
    pack_into(expected, ids[placed], keys[placed], values[placed], layout, pages=1)
    assert torch.equal(pool, expected)
    assert (pool[[1, 2, 5, 7]] == 255).all()
