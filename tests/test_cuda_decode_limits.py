"""Which calls and pages decode attention in CUDA C++ declines, because it was not made for them."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import LENGTHS, packed_states
from torch import Tensor

from oscar_kv import OscarConfig, PackedKV
from oscar_kv.kernels.call import AttentionCall
from oscar_kv.kernels.cuda_decode import COLUMNS, takes, unsupported
from oscar_kv.kernels.masking import Visibility
from oscar_kv.storage.layout import PageLayout


def test_declines_what_it_was_not_made_for() -> None:
    usual = packed_states(OscarConfig(), 64, dtype=torch.float16)

    def taken(
        group: int = 4,
        tokens: int = 1,
        dtype: torch.dtype = torch.float16,
        mask: Tensor | None = None,
        packed: PackedKV = usual,
    ) -> bool:
        layout = packed.layout
        query = torch.zeros(
            packed.batch_size, group * layout.num_kv_heads, tokens, layout.head_dim, dtype=dtype
        )
        return takes(AttentionCall(query, packed, Visibility(tokens, mask=mask), 1.0))

    assert taken()
    assert taken(COLUMNS, 1)
    assert taken(1, COLUMNS)
    assert not taken(COLUMNS + 1, 1)
    assert not taken(4, 3)
    assert not taken(dtype=torch.float32)
    assert not taken(dtype=torch.bfloat16)  # and the states are float16
    assert not taken(dtype=torch.float32, packed=packed_states(OscarConfig(), 64))
    assert not taken(mask=torch.ones(1, 1, 1, max(LENGTHS), dtype=torch.bool))
    assert not taken(packed=packed_states(OscarConfig(), 96, dtype=torch.float16))
    assert not taken(packed=packed_states(OscarConfig(), 64, 80, dtype=torch.float16))


@pytest.mark.parametrize(
    ("config", "channels", "heads", "reason"),
    [
        (OscarConfig(), (64, None), 3, None),
        (OscarConfig(), (96, None), 2, "head_dim=96"),
        (OscarConfig(), (64, 80), 2, "value_head_dim=80"),
        (OscarConfig(value_group=8), (64, None), 2, "value_group=8"),
        (OscarConfig.paper(), (128, None), 1, None),
        (OscarConfig.paper(), (128, None), 2, None),
        (OscarConfig.paper(), (128, None), 8, None),
        (OscarConfig.paper(), (128, None), 3, "shared by 3 heads"),
        (OscarConfig.paper(), (128, None), 32, "shared by 32 heads"),
    ],
)
def test_says_which_pages_it_cannot_read(
    config: OscarConfig, channels: tuple[int, int | None], heads: int, reason: str | None
) -> None:
    found = unsupported(PageLayout(config, channels[0], heads, channels[1]))
    assert found is None if reason is None else found is not None and reason in found
