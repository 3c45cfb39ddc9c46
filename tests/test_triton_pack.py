"""The Triton kernels that write pages and read them back, against what a page means.

They run on a GPU and in Triton's interpreter alike; there bfloat16 matrix products are wrong, so it
is left to the GPU.
"""

from __future__ import annotations

from typing import Any

import pack_checks
import pytest
import torch
from kernel_checks import DEVICE
from kernel_checks import GPU as ON_GPU
from pack_checks import page_states, relative_error
from states import KINDS, states

from oscar_kv import OscarConfig
from oscar_kv.kernels.triton_append import append
from oscar_kv.kernels.triton_backend import append_step
from oscar_kv.kernels.triton_pack import pack_into
from oscar_kv.kernels.triton_unpack import unpack
from oscar_kv.storage import codec
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV

# NaN and Inf are part of the tests, and the interpreter computes with NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
MINMAX: dict[str, Any] = {"fit": "minmax", "token_scale": "cross_head"}

CASES: dict[str, tuple[OscarConfig, int, int]] = {
    "compact": (OscarConfig.compact(), 64, 64),
    "quality": (OscarConfig.quality(), 128, 128),
    "high": (OscarConfig.high(), 64, 64),
    "paper": (OscarConfig.paper(), 64, 64),
    "80: groups of 40": (OscarConfig(value_group=32), 80, 80),
    "80: groups of 16": (OscarConfig(value_group=16), 80, 80),
    "96: groups of 32": (OscarConfig(value_group=32, key_group=16), 96, 96),
    "112, 4-bit values": (OscarConfig(value_bits=4), 112, 112),
    "192": (OscarConfig(key_group=64, metadata="fp16"), 192, 192),
    "256, values of 64": (OscarConfig(), 256, 64),
    "no scale": (OscarConfig(token_scale="none", key_bits=4, value_bits=4), 64, 72),
    "half a norm": (OscarConfig(token_scale_exponent=0.5, metadata="fp16"), 32, 32),
    "minmax fp8": (OscarConfig(fit="minmax", value_group=16), 64, 64),
    "shared scales": (OscarConfig(**MINMAX, key_group=64), 16, 48),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_pages_are_as_good_as_the_references(case: str, dtype: torch.dtype) -> None:
    config, key_dim, value_dim = CASES[case]
    layout = PageLayout(config, key_dim, 3, value_dim)
    keys, values = page_states("norm_imbalance", 2, 3, key_dim, value_dim, dtype)
    pack_checks.check_quality(pack_into, keys, values, layout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_reading_is_unbiased_and_every_code_is_used(kind: str, bits: int) -> None:
    pack_checks.check_unbiased(pack_into, kind, bits, torch.float32)


@pytest.mark.parametrize("preset", ["compact", "paper"])
@pytest.mark.parametrize("rows", [slice(5, 9), slice(None)])
def test_zero_tokens_read_as_zeros(preset: str, rows: slice) -> None:
    layout = PageLayout(OscarConfig.preset(preset), 64, 2)
    pack_checks.check_zero_tokens(pack_into, layout, rows, torch.float32)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", ["compact", "paper", "80: groups of 16"])
def test_a_token_that_is_not_finite_is_stored_as_zeros(case: str, number: float) -> None:
    config, dim, _ = CASES[case]
    layout = PageLayout(config, dim, 2)
    pack_checks.check_not_finite(pack_into, layout, number, 17, torch.float32)


def test_pages_of_a_prompt_go_straight_into_a_pool() -> None:
    pack_checks.check_prompt(pack_into, 32, torch.float32)
    pack_checks.check_left_out(pack_into, 32, torch.float32)


def test_unbiased_scales_of_all_heads_take_the_plain_way() -> None:
    layout = PageLayout(OscarConfig(token_scale="cross_head"), 32, 2)
    keys, values = page_states("gaussian", 2, 2, 32, 32, torch.float32)
    pages = pack_checks.pack(pack_into, keys, values, layout)
    assert torch.equal(pages, codec.encode_pages(keys, values, layout))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        ("quality", torch.float16),
        ("paper", torch.bfloat16),
    ],
)
def test_unpack(case: str, dtype: torch.dtype) -> None:
    config, key_dim, value_dim = CASES[case]
    layout = PageLayout(config, key_dim, 3, value_dim)
    pages = codec.encode_pages(
        *page_states("norm_imbalance", 1, 3, key_dim, value_dim, torch.float32), layout
    )
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    expected = codec.decode_pages(pages, layout, torch.float64)
    for read, exact in zip(unpack(pages, layout, dtype), expected):
        assert read.dtype == dtype
        assert relative_error(read.double(), exact) < limit


def device_cache(packed: PackedKV, pages: int) -> dict[str, Any]:
    """Arguments of the kernel: an empty cache like ``packed`` with ``pages`` pages per sequence."""
    batch, device = packed.batch_size, packed.device
    shape = (batch * pages, packed.layout.num_kv_heads, packed.layout.page_bytes)
    names = ("tail_keys", "tail_values", "sink_keys", "sink_values")
    lengths = ("tail_lengths", "sink_lengths", "page_counts")
    return {
        "layout": packed.layout,
        **{name: getattr(packed, name).clone() for name in names + lengths},
        "block_table": torch.randperm(shape[0]).int().view(batch, pages).to(device),
        "pool": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        "arrivals": torch.zeros(batch, dtype=torch.int32, device=device),
        "nonfinite": torch.zeros(1, dtype=torch.int32, device=device),
    }


@pytest.mark.parametrize(
    ("recent", "sinks", "new_tokens", "steps", "ragged", "settings"),
    [
        (0, 0, 1, 130, False, {}),
        (128, 5, 16, 26, False, {}),
        (40, 0, 3, 200, True, {"value_group": 8}),
        (0, 5, 16, 36, True, {}),
        (0, 0, 16, 25, True, {**MINMAX, "metadata": "fp16"}),
        (40, 5, 16, 24, True, MINMAX),
    ],
)
def test_append_is_that_of_packed_kv(
    recent: int, sinks: int, new_tokens: int, steps: int, ragged: bool, settings: dict[str, Any]
) -> None:
    batch, heads, key_dim, value_dim = 2, 2, 16, 24
    config = OscarConfig(recent_tokens=recent, sink_tokens=sinks, check_finite=False, **settings)
    packed = PackedKV(
        config,
        batch_size=batch,
        num_kv_heads=heads,
        head_dim=key_dim,
        value_head_dim=value_dim,
        device=DEVICE,
    )
    cache = device_cache(packed, pages=4)
    keys, _ = states("norm_imbalance", batch, heads, steps * new_tokens, key_dim)
    _, values = states("norm_imbalance", batch, heads, steps * new_tokens, value_dim)
    keys, values = keys.to(DEVICE), values.to(DEVICE)
    keys[0, 1, 0, 3], values[1, 0, -new_tokens, 2] = float("nan"), float("inf")
    stored = 0
    for step in range(steps):
        counts = None
        if ragged:
            counts = torch.randint(0, new_tokens + 1, (batch,), dtype=torch.int32)
            counts[0 if step == 0 else 1] = new_tokens
            stored = stored + counts
        now = slice(step * new_tokens, (step + 1) * new_tokens)
        packed.append(
            keys[:, :, now],
            values[:, :, now],
            lengths=None if counts is None else counts.tolist(),
        )
        on_device = None if counts is None else counts.to(DEVICE)
        append(keys[:, :, now], values[:, :, now], on_device, **cache)
        for name in ("tail_lengths", "sink_lengths", "page_counts"):
            assert torch.equal(cache[name], getattr(packed, name)), (step, name)
        assert not cache["arrivals"].any()
    assert cache["nonfinite"].item() == 2
    assert min(packed.pages_per_sequence) > 0
    for row in range(batch):
        for part, lengths in (("sink", packed.sink_lengths), ("tail", packed.tail_lengths)):
            for kind in ("keys", "values"):
                name = f"{part}_{kind}"
                used = int(lengths[row])
                assert torch.equal(
                    cache[name][row, :, :used], getattr(packed, name)[row, :, :used]
                ), (row, name)
        count = packed.pages_per_sequence[row]
        pages = cache["pool"][cache["block_table"][row, :count].long()]
        expected = packed.pages(packed.block_table[row, :count])
        for read, wanted in zip(
            codec.decode_pages(pages, packed.layout), codec.decode_pages(expected, packed.layout)
        ):
            assert relative_error(read, wanted) < 0.05


def test_append_refuses_what_it_cannot_do() -> None:
    packed = PackedKV(OscarConfig(), batch_size=1, num_kv_heads=1, head_dim=16, device=DEVICE)
    cache = device_cache(packed, pages=1)
    many = torch.zeros(1, 1, 17, 16, device=DEVICE)
    with pytest.raises(ValueError, match="17 new tokens: expected at most 16"):
        append(many, many, None, **cache)
    apart = torch.zeros(1, 1, 16, 2, device=DEVICE).mT
    with pytest.raises(ValueError, match="next to each other"):
        append(apart, apart, None, **cache)
    cache["layout"] = PageLayout(OscarConfig(token_scale="cross_head"), 16, 1)
    with pytest.raises(ValueError, match="cross_head"):
        append(many[:, :, :1], many[:, :, :1], None, **cache)


@pytest.mark.parametrize("reserved", [0, 150])
def test_steps_equal_plain_appends(reserved: int) -> None:
    """``append_step`` with this kernel against ``append``, pages allocated as needed or before."""
    keys, values = (x.to(DEVICE) for x in states("gaussian", 2, 2, 300, 32))
    config = OscarConfig(recent_tokens=16)
    stepwise, plain = (
        PackedKV(config, batch_size=2, num_kv_heads=2, head_dim=32, device=DEVICE) for _ in range(2)
    )
    for packed in (stepwise, plain):
        packed.append(keys[:, :, :150], values[:, :, :150])
    stepwise.reserve(reserved)
    for begin in range(150, 300, 6):
        new = keys[:, :, begin : begin + 6], values[:, :, begin : begin + 6]
        stepwise.append_step(*new, append_step)
        plain.append(*new)
    assert stepwise.lengths == plain.lengths
    assert stepwise.page_counts.tolist() == plain.pages_per_sequence
    assert stepwise.tail_lengths.tolist() == plain.tails_per_sequence
    for one, other in zip(stepwise.dense(), plain.dense()):
        assert relative_error(one, other) < 0.05
