"""Pages made on a CPU and on a GPU, attended by the backend that each of them prefers."""

from __future__ import annotations

import pytest
import torch
from states import states

from oscar_kv import OscarConfig, extend_attention, quantize
from oscar_kv.config import PRESETS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_pages_and_attention_agree_with_the_cpu(preset: str, head_dim: int) -> None:
    lengths = [20, 128, 256, 700]
    keys, values = states("gaussian", 4, 2, 700, head_dim)
    on_cpu = quantize(keys, values, OscarConfig.preset(preset), lengths=lengths)
    on_gpu = quantize(keys.cuda(), values.cuda(), OscarConfig.preset(preset), lengths=lengths)
    assert on_gpu.pages_per_sequence == on_cpu.pages_per_sequence
    queries = [torch.randn(4, 6, tokens, head_dim) for tokens in (1, 20)]
    expected = [extend_attention(query, on_cpu) for query in queries]
    # The same bytes, attended with float16 operands; quantizing on the GPU may differ at ties.
    moved = on_cpu.to("cuda")
    for packed, tolerance in ((moved, 2e-3), (on_gpu, 0.02)):
        for query, wanted in zip(queries, expected):
            out = extend_attention(query.cuda(), packed).cpu()
            assert torch.linalg.vector_norm(out - wanted) < tolerance * wanted.norm()
    on_gpu.crop([0, 100, 200, 600])
    on_gpu.select([3, 3, 0])
    assert on_gpu.lengths == [600, 600, 0]
