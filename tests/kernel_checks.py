"""What the tests of the attention kernels share: packed states, and a comparison with the oracle.

On a GPU the kernels run there; otherwise in Triton's interpreter, where bfloat16 matrix products
are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from states import states
from torch import Tensor

from oscar_kv import OscarConfig, PackedKV, quantize
from oscar_kv.core.attention import attention
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.masking import Visibility

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="too slow, or wrong, in Triton's interpreter")

# Queries, dequantized tiles and softmax weights are float16: 2**-12 relative on average, and a
# logit's error enters its weight as it is. The output is rounded to the query's dtype on top.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# no page, one page exactly (with and without a window), pages and a tail
LENGTHS = (70, 127, 128, 256, 517)


def packed_states(
    config: OscarConfig,
    head_dim: int,
    value_dim: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> PackedKV:
    """Token norms differ, but logits stay where float16 queries keep three digits."""
    shape = (len(lengths), heads, max(lengths))
    keys, values = states("gaussian", *shape, head_dim)
    keys *= torch.exp(0.5 * torch.randn(*shape, 1))
    if value_dim is not None:
        values = torch.randn(*shape, value_dim)
    keys, values = (x.to(DEVICE, dtype) for x in (keys, values))
    return quantize(keys, values, config, lengths=lengths)


def check(
    attend: Callable[..., Tensor],
    packed: PackedKV,
    group: int,
    tokens: int,
    *,
    fresh: bool = False,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Compares ``attend`` with the oracle, sequence by sequence.

    Args:
        attend: as :func:`oscar_kv.kernels.reference.attend`.
        group: query heads per KV head.
        tokens: queries per sequence.
        fresh: hand over exact keys and values of the newest tokens.
        options: scaling, starts, sliding_window, softcap, s_aux, mask.
    """
    layout = packed.layout
    query = torch.randn(
        packed.batch_size, tokens, group * layout.num_kv_heads, layout.head_dim, device=DEVICE
    )
    query = query.to(packed.dtype if dtype is None else dtype).transpose(1, 2)  # as models make it
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    keys, values = packed.dense(torch.float64)
    new: list[Tensor | None] = [None, None]
    if fresh:
        shape = (packed.batch_size, layout.num_kv_heads, tokens)
        for part, (dense, channels) in enumerate(
            ((keys, layout.head_dim), (values, layout.value_dim))
        ):
            exact = torch.randn(*shape, channels, device=DEVICE).to(packed.dtype)
            for row, length in enumerate(packed.lengths):
                dense[row, :, length - tokens : length] = exact[row].double()
            new[part] = exact
    lengths = torch.tensor(packed.lengths, device=DEVICE)
    expected = dict(options)
    if (mask := options.get("mask")) is not None:
        exists = torch.arange(mask.shape[-1], device=DEVICE) < lengths.view(-1, 1, 1, 1)
        is_bool = mask.dtype == torch.bool
        full = mask & exists if is_bool else mask.masked_fill(~exists, -torch.inf)
        expected["mask"] = full[..., : packed.max_length]
    wanted = attention(query.double(), keys, values, lengths=lengths, **expected)
    visibility = Visibility(
        tokens,
        options.get("starts"),
        options.get("sliding_window"),
        options.get("mask"),
    )
    scaling = options.get("scaling", layout.head_dim**-0.5)
    found = attend(
        AttentionCall(
            query,
            packed,
            visibility,
            scaling,
            new[0],
            new[1],
            options.get("softcap"),
            options.get("s_aux"),
        )
    )
    assert found.shape == wanted.shape
    assert found.dtype == query.dtype
    assert found.isfinite().all()
    for one, other in zip(found.double(), wanted):
        error = torch.linalg.vector_norm(one - other)
        rows = one.shape[0] * one.shape[1]  # the fewer, the less their errors are an average
        assert error <= TOLERANCE[query.dtype] * (1 + 4 / rows) * other.norm() + 1e-12
    return found


HEAD_DIMS = ((64, None), (80, None), (96, None), (112, None), (128, None), (192, 128), (256, None))

OPTIONS: dict[str, dict[str, Any]] = {
    "scaling": {"scaling": 0.2},
    "negative scaling": {"scaling": -0.1},
    "softcap": {"softcap": 2.0},
    "sliding window": {"sliding_window": 70},
    "left padding": {"starts": torch.tensor([3, 100, 0, 127, 300])},
    "attention sinks": {"s_aux": torch.tensor([1.0, -2.0, 30.0, 0.0, 5.0, -torch.inf])},
    "all": {
        "scaling": 0.2,
        "softcap": 5.0,
        "sliding_window": 200,
        "starts": torch.tensor([0, 100, 5, 2, 400]),
        "s_aux": torch.linspace(-2, 2, 6),
    },
}
