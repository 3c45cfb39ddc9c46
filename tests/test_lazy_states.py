"""What an update of a layer returns: looks and computes like the tensors it stands for."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from layer_checks import CHUNK, HEAD_DIM, HEADS, dense, filled_layer, states
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from oscar_kv import OscarConfig
from oscar_kv.integrations.attention_function import oscar_attention_forward
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.lazy import AttentionView, LazyStates


@pytest.fixture(params=[1, CHUNK], ids=["step", "chunk"])
def lazy_pair(request: pytest.FixtureRequest) -> tuple[LazyStates, LazyStates]:
    """What a layer returns for one new token, and for new tokens that are in part packed."""
    keys, values = filled_layer(380).update(*states(request.param, seed=1))
    assert isinstance(keys, LazyStates)
    assert isinstance(values, LazyStates)
    return keys, values


Pair = tuple[LazyStates, LazyStates]


def test_lazy_states_look_like_tensors(lazy_pair: Pair) -> None:
    for part, lazy in enumerate(lazy_pair):
        plain = lazy.view_of.dense[part]
        assert isinstance(lazy, Tensor)
        assert lazy.shape == plain.shape
        assert lazy.dtype == plain.dtype
        assert lazy.device == plain.device
        assert lazy.stride() == plain.stride()
        assert lazy.is_contiguous()
        assert not lazy.requires_grad
        assert ("keys", "values")[part] in repr(lazy)


def test_lazy_values_may_be_narrower() -> None:
    layer = OscarLayer(OscarConfig())
    for length in (300, 1):
        keys, values = states(length)
        lazy = layer.update(keys, values[..., :16])
    assert lazy[0].shape == (2, HEADS, 301, 32)
    assert lazy[1].shape == (2, HEADS, 301, 16)
    assert torch.equal(lazy[1][:, :, -1], values[:, :, 0, :16])


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda t: t + 1,
    "index": lambda t: t[:, 1:, ::7, None],
    "transpose": lambda t: t.transpose(1, 2),
    "contiguous": lambda t: t.contiguous() * 1,
    "clone": lambda t: t.clone(),
    "to": lambda t: t.to(torch.bfloat16),
    "reshape": lambda t: t.reshape(2, -1, HEAD_DIM),
    "repeat_kv": lambda t: t[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, 6, -1, HEAD_DIM),
    "matmul": lambda t: torch.ones(2, HEADS, 5, HEAD_DIM) @ t.mT,
    "linear": lambda t: torch.nn.functional.linear(t, torch.ones(3, HEAD_DIM)),
    "einsum": lambda t: torch.einsum("bhtd,bhtd->bht", t, t),
    "cat": lambda t: torch.cat([t, torch.zeros(2, HEADS, 1, HEAD_DIM), t], 2),
    "split": lambda t: t.split([8, 24], -1)[1],
    "chunks": lambda t: torch.stack(list(t.unbind(0))),
    "where": lambda t: torch.where(t > 0, t, -t),
    "norm": lambda t: t.norm(dim=-1),
    "softmax": lambda t: t.softmax(-1),
    "isfinite": lambda t: t.isfinite().all(),
    "item": lambda t: t[0, 0, 0, 0].item(),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy().sum(),
    "deepcopy": lambda t: copy.deepcopy(t) * 1,
    "sdpa": lambda t: scaled_dot_product_attention(torch.ones(2, HEADS, 3, HEAD_DIM), t, t),
    "sdpa_gqa": lambda t: scaled_dot_product_attention(
        torch.ones(2, 3 * HEADS, 3, HEAD_DIM), t, t, enable_gqa=True
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_lazy_states_compute_like_tensors(lazy_pair: Pair, operation: str) -> None:
    for part, lazy in enumerate(lazy_pair):
        result = OPERATIONS[operation](lazy)
        expected = OPERATIONS[operation](lazy.view_of.dense[part])
        if isinstance(expected, Tensor):
            assert type(result) is Tensor
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)
        else:
            assert result == expected


BEYOND_THE_DISPATCHER: dict[str, Callable[[Tensor], Any]] = {
    "torch.from_dlpack": lambda t: torch.from_dlpack(t).clone(),
    "numpy.from_dlpack": lambda t: torch.from_numpy(np.from_dlpack(t).copy()),
    "numpy.asarray": lambda t: torch.from_numpy(np.asarray(t).copy()),
    "share_memory_": lambda t: t.share_memory_().clone(),
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "torch.save": lambda t: _saved(t),
    "safetensors": lambda t: safetensors.torch.load(safetensors.torch.save({"t": t}))["t"],
    "storage": lambda t: (
        torch.tensor(t.untyped_storage().tolist(), dtype=torch.uint8)
        .view(torch.float32)
        .view(t.shape)
    ),
    "detach": lambda t: t.detach() * 1,
    "data": lambda t: t.data * 1,
    "vmap": lambda t: torch.vmap(lambda row: row * 1)(t),
    "iteration": lambda t: torch.stack(list(t)),
    "copy_ into another": lambda t: torch.empty(t.shape).copy_(t),
    "setitem of another": lambda t: _assigned(torch.zeros(t.shape), t),
}


def _saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def _assigned(target: Tensor, source: Tensor) -> Tensor:
    target[...] = source
    return target


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("way", BEYOND_THE_DISPATCHER)
def test_lazy_states_leave_torch_as_plain_tensors(way: str, mode: Any) -> None:
    """By ways that torch's dispatcher does not see, in every mode, in whichever they were made."""
    with mode():
        layer = filled_layer(380)
        assert layer.keys is not None
        found = BEYOND_THE_DISPATCHER[way](layer.keys)
    assert type(found) is Tensor
    assert torch.equal(found, dense(layer)[0])


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "+= of a part": lambda t: t.__setitem__((slice(None), 0), t[:, 0] + 1),
    "mul_": lambda t: t.mul_(2),
    "zero_": lambda t: t.zero_(),
    "copy_": lambda t: t.copy_(torch.zeros(t.shape)),
    "out=": lambda t: torch.add(t, 1, out=t),
    "iadd": lambda t: t.__iadd__(1),
    "relu inplace": lambda t: torch.nn.functional.relu(t, inplace=True),
    "fill_diagonal_": lambda t: t.masked_fill_(t > 0, 0),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_writing_to_lazy_states_is_refused(write: str, mode: Any) -> None:
    layer = filled_layer(380)
    before = [x.clone() for x in dense(layer)]
    for name in ("keys", "values"):
        with mode(), pytest.raises(RuntimeError, match=r"clone\(\) them"):
            WRITES[write](getattr(layer, name))
        with pytest.raises(AttributeError, match=r"crop\(\)"):
            setattr(layer, name, torch.zeros(1))
    assert all(torch.equal(one, other) for one, other in zip(dense(layer), before))


def test_lazy_states_hold_new_tokens_exactly() -> None:
    layer = filled_layer(380)
    new_keys, new_values = states(CHUNK, seed=1)
    keys, values = layer.update(new_keys, new_values)
    stored_keys, _ = dense(layer)
    assert not torch.equal(stored_keys[:, :, 380:], new_keys)
    assert torch.equal(keys[:, :, 380:], new_keys)
    assert torch.equal(values[:, :, 380:], new_values)
    assert torch.equal(keys[:, :, :380], stored_keys[:, :, :380])


def test_view_of_tail_tokens_needs_no_copies() -> None:
    keys, _ = filled_layer().update(*states(1, seed=1))
    assert isinstance(keys, LazyStates)
    assert isinstance(keys.view_of, AttentionView)
    assert keys.view_of.new_keys is None


def test_states_of_an_earlier_update_are_refused() -> None:
    layer = OscarLayer(OscarConfig())
    layer.update(*states(300))
    old = layer.update(*states(1))
    layer.update(*states(1))
    with pytest.raises(RuntimeError, match="before the next update"):
        old[0].clone()
    with pytest.raises(RuntimeError, match="before the next update"):
        oscar_attention_forward(torch.nn.Module(), torch.randn(2, HEADS, 1, HEAD_DIM), *old, None)
