"""``OscarCache`` and its layers by themselves: state, lazy states, memory, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, page_counts, teacher_forced, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig

from oscar_kv import OscarConfig
from oscar_kv.integrations.attention_function import oscar_attention_forward
from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.lazy import AttentionView, LazyStates
from oscar_kv.integrations.transformers import OscarCache

HEADS, HEAD_DIM = 2, 32


def states(length: int, batch: int = 2, seed: int = 0, **like: Any) -> tuple[Tensor, Tensor]:
    """Random keys and values ``[batch, 2, length, 32]``."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, length, HEAD_DIM, generator=generator)
    return keys.to(**like), values.to(**like)


CHUNK = 200
"""So many new tokens on top of 380 are in part packed at once."""


def filled_layer(length: int = 300, config: OscarConfig | None = None, **more: Any) -> OscarLayer:
    layer = OscarLayer(OscarConfig() if config is None else config)
    layer.update(*states(length, **more))
    return layer


def dense(layer: OscarLayer) -> tuple[Tensor, Tensor]:
    assert layer.packed is not None
    return layer.packed.dense()


def assert_same_states(a: OscarLayer, b: OscarLayer) -> None:
    assert a.packed is not None
    assert b.packed is not None
    assert a.packed.pages_per_sequence == b.packed.pages_per_sequence
    for one, other in zip(dense(a), dense(b), strict=True):
        assert torch.equal(one, other)


# -- lazy states -----------------------------------------------------------------------------


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


def test_lazy_states_hold_new_tokens_exactly() -> None:
    layer = filled_layer(380)
    new_keys, new_values = states(CHUNK, seed=1)
    keys, values = layer.update(new_keys, new_values)
    stored_keys, _ = dense(layer)
    assert not torch.equal(stored_keys[:, :, 380:], new_keys)
    assert torch.equal(keys[:, :, 380:], new_keys)
    assert torch.equal(values[:, :, 380:], new_values)
    assert torch.equal(keys[:, :, :380], stored_keys[:, :, :380])


# -- one layer -------------------------------------------------------------------------------


def test_first_update_returns_exact_states() -> None:
    keys, values = states(300)
    returned = OscarLayer(OscarConfig()).update(keys, values)
    assert returned[0] is keys
    assert returned[1] is values


def test_mask_sizes_and_lengths() -> None:
    layer = OscarLayer(OscarConfig())
    assert (layer.get_seq_length(), layer.get_max_length()) == (0, -1)
    assert layer.get_mask_sizes(7) == (7, 0)
    layer.update(*states(300))
    assert (layer.get_seq_length(), layer.get_max_length()) == (300, -1)
    assert layer.get_mask_sizes(7) == (307, 0)


def test_rollback_within_the_tail_leaves_no_trace() -> None:
    layer, untouched = filled_layer(), filled_layer()
    assert layer.is_croppable
    layer.update(*states(20, seed=1))
    layer.crop(-15)
    layer.crop(torch.tensor(-5))  # type: ignore[arg-type]  # as assisted generation may
    assert_same_states(layer, untouched)
    for each in (layer, untouched):
        each.update(*states(100, seed=2))
    assert page_counts(SimpleNamespace(layers=[layer])) == [2]
    assert_same_states(layer, untouched)


def test_rollback_into_a_page_keeps_the_rest_as_it_was_read() -> None:
    layer = filled_layer(config=OscarConfig.paper())
    assert not layer.is_croppable
    before, _ = dense(layer)
    layer.crop(-100)
    assert layer.get_seq_length() == 200
    after, _ = dense(layer)
    assert torch.allclose(after, before[:, :, :200], atol=1e-5)


@pytest.mark.parametrize("wrong", [5, -301])
def test_crop_refuses(wrong: int) -> None:
    layer = filled_layer()
    with pytest.raises(ValueError, match=r"crop|lengths"):
        layer.crop(wrong)
    assert_same_states(layer, filled_layer())


def test_crop_of_nothing() -> None:
    OscarLayer(OscarConfig()).crop(-3)  # nothing to forget yet
    layer = filled_layer()
    layer.crop(0)
    assert_same_states(layer, filled_layer())


@pytest.mark.parametrize(
    ("rearrange", "rows"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([-1, 0])), [1, 0]),
        (lambda layer: layer.batch_select_indices(torch.tensor([False, True])), [1]),
    ],
    ids=["reorder", "repeat", "select", "select_negative", "select_mask"],
)
def test_rearranged_batch_goes_on_as_its_rows_would(
    rearrange: Callable[[OscarLayer], None], rows: list[int]
) -> None:
    layer = filled_layer()
    rearrange(layer)
    keys, values = states(300)
    expected = OscarLayer(OscarConfig())
    expected.update(keys[rows], values[rows])
    new = states(100, batch=len(rows), seed=1)  # completes a page
    for each in (layer, expected):
        each.update(*new)
    assert_same_states(layer, expected)


def test_empty_layer_is_rearranged_for_nothing() -> None:
    layer = OscarLayer(OscarConfig())
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([0]))
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert layer.get_seq_length() == 0


def test_reset_forgets_everything() -> None:
    layer = filled_layer()
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.is_initialized
    layer.update(*states(140, batch=3, seed=4))
    assert_same_states(layer, filled_layer(140, batch=3, seed=4))


def test_inference_mode_can_be_left() -> None:
    with torch.inference_mode():
        layer = filled_layer(250)
        layer.reorder_cache(torch.tensor([1, 0]))
    layer.update(*states(50, seed=1))
    with torch.inference_mode():
        layer.update(*states(150, seed=2))
    layer.update(*states(1, seed=3))
    assert layer.get_seq_length() == 451


def test_early_initialization_commits_to_nothing() -> None:
    # Transformers does not know that values may have another width than keys.
    layer = OscarLayer(OscarConfig())
    layer.lazy_initialization(torch.zeros(2, HEADS, 0, HEAD_DIM), torch.zeros(2, HEADS, 0, 32))
    assert layer.is_initialized
    keys, values = states(200)
    layer.update(keys, values[..., :16])
    assert layer.get_seq_length() == 200
    assert dense(layer)[1].shape == (2, HEADS, 200, 16)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("length", [0, 300])
def test_non_finite_states_raise_and_change_nothing(poison: float, length: int) -> None:
    layer = filled_layer(length) if length else OscarLayer(OscarConfig())
    keys, values = states(10, seed=1)
    keys[1, 0, 3, 5] = poison
    with pytest.raises(ValueError, match="NaN, Inf"):
        layer.update(keys, values)
    assert layer.get_seq_length() == length
    assert layer.is_initialized == (length > 0)
    if length:
        assert_same_states(layer, filled_layer(length))
    else:
        layer.update(*states(5, batch=1))  # not even the batch size is remembered


@pytest.mark.parametrize("change", ["batch", "heads", "channels", "dtype"])
def test_states_of_another_kind_raise_and_change_nothing(change: str) -> None:
    layer = filled_layer()
    keys, values = states(10, seed=1)
    if change == "dtype":
        wrong = keys.bfloat16(), values.bfloat16()
    else:
        index = {"batch": 0, "heads": 1, "channels": 3}[change]
        wrong = keys.narrow(index, 0, 1), values.narrow(index, 0, 1)
    with pytest.raises((ValueError, TypeError)):
        layer.update(*wrong)
    assert_same_states(layer, filled_layer())


# -- the attention function ------------------------------------------------------------------


def attend(key: Tensor, value: Tensor, queries: int = 1, **arguments: Any) -> Tensor:
    """The attention function on random queries, two heads per KV head."""
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(2, 2 * HEADS, queries, HEAD_DIM, generator=generator)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    arguments = {"attention_mask": None, **arguments}
    out, weights = oscar_attention_forward(module, query, key, value, **arguments)  # type: ignore[arg-type]
    assert weights is None
    return out


def test_states_that_a_model_has_changed_are_honoured() -> None:
    keys, values = filled_layer().update(*states(5, seed=1))
    doubled = attend(keys, values * 2, queries=5)
    assert torch.allclose(doubled, 2 * attend(keys, values, queries=5), atol=1e-5)
    # Keys and values of two different layers.
    _, others = filled_layer(seed=7).update(*states(5, seed=8))
    mixed = attend(keys, others, queries=5)
    assert torch.allclose(mixed, attend(keys.clone(), others.clone(), queries=5), atol=1e-5)


@pytest.mark.parametrize("new", [20, CHUNK])
def test_fewer_queries_than_new_tokens(new: int) -> None:
    """Layers that share keys may compute only the last tokens of a prompt."""
    keys, values = filled_layer(380).update(*states(new, seed=1))
    few = attend(keys, values, queries=3)
    assert torch.allclose(few, attend(keys.clone(), values.clone(), queries=3), atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"softcap": 5.0}, {"s_aux": torch.tensor([0.5, 1, 2, 3])}])
def test_bidirectional_attention_sees_everything(extra: dict[str, Any]) -> None:
    """Without a mask, and from a module or call that says it is not causal."""
    keys, values = filled_layer().update(*states(4, seed=1))
    everything = torch.ones(1, 1, 4, 304, dtype=torch.bool)
    for key, value in ((keys, values), (keys.clone(), values.clone())):
        free = attend(key, value, queries=4, is_causal=False, **extra)
        masked = attend(key, value, queries=4, attention_mask=everything, **extra)
        causal = attend(key, value, queries=4, **extra)
        assert torch.allclose(free, masked, atol=1e-5)
        assert not torch.allclose(free, causal, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 0.1),
        ("indices", torch.zeros(1, 1, 4, dtype=torch.int64)),
        ("block_indices", torch.zeros(1, 1, 4, dtype=torch.int64)),
    ],
)
def test_what_cannot_be_honoured_raises(name: str, value: Any) -> None:
    keys, values = filled_layer().update(*states(1, seed=1))
    with pytest.raises(ValueError, match=name):
        attend(keys, values, **{name: value})


@pytest.mark.parametrize("masked", [False, True])
def test_position_bias_is_added_to_logits(masked: bool) -> None:
    """Packed attention of a bias equals scaled-dot-product attention over the same states."""
    keys, values = filled_layer().update(*states(4, seed=1))
    mask = torch.ones(1, 1, 4, 304, dtype=torch.bool).tril(300) if masked else None
    bias = torch.randn(1, 4, 4, 304)
    plain = attend(keys.clone(), values.clone(), 4, attention_mask=mask, position_bias=bias)
    packed = attend(keys, values, 4, attention_mask=mask, position_bias=bias)
    assert torch.allclose(packed, plain, atol=1e-4)
    assert not torch.allclose(packed, attend(keys, values, 4, attention_mask=mask), atol=1e-2)


def test_layer_hands_out_its_states() -> None:
    """Some models read ``keys`` and ``values`` of a layer instead of what an update returned."""
    layer = OscarLayer(OscarConfig.compact())
    assert layer.keys is None
    assert layer.values is None
    new = states(40)
    layer.update(*new)
    assert layer.keys is not None
    assert layer.values is not None
    assert torch.equal(layer.keys.clone(), new[0])
    assert torch.equal(layer.values.clone(), new[1])


def test_sparse_selection_raises_with_any_cache() -> None:
    with pytest.raises(ValueError, match="indices"):
        attend(*states(10), indices=torch.zeros(1, 1, 4, dtype=torch.int64))


# -- the whole cache -------------------------------------------------------------------------


def test_batch_rows_can_be_selected_between_steps() -> None:
    model = FAMILIES["Llama"].model("oscar")
    ids = tokens(3, 310)
    cache = OscarCache(model.config)
    teacher_forced(model, ids[:, :300], [300], cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    rows = ids[[2, 0]]
    continued = teacher_forced(model, rows[:, 300:], [1, 9], cache)
    fresh = teacher_forced(model, rows, [300, 1, 9], OscarCache(model.config))
    assert torch.allclose(continued, fresh[:, 300:], atol=1e-3)


def test_memory_counts_every_layer() -> None:
    model = FAMILIES["Gemma3Text"].model("oscar")
    cache = OscarCache(model.config)
    assert cache.nbytes == cache.memory()["other"] >= 0
    teacher_forced(model, tokens(1, 400), [400], cache)
    kinds = cache.memory()
    quantized = cache.layers[1]
    assert isinstance(quantized, OscarLayer)
    assert quantized.packed is not None
    sliding: Any = cache.layers[0]
    assert kinds["codes"] == quantized.packed.memory()["codes"] > 0
    assert kinds["other"] >= 2 * sliding.keys.nbytes > 0
    assert cache.nbytes == quantized.packed.nbytes + kinds["other"]


def test_memory_counts_convolution_states() -> None:
    cache = OscarCache(FAMILIES["Lfm2"].model("oscar").config)
    teacher_forced(FAMILIES["Lfm2"].model("oscar"), tokens(2, 10), [10], cache)
    layer: Any = cache.layers[0]
    assert cache.memory()["other"] == layer.conv_states[0].nbytes > 0


@pytest.mark.parametrize(
    ("preset", "length", "ratio"),
    [("compact", 1 << 15, 6.7), ("compact", 1 << 17, 7.1), ("paper", 1 << 15, 5.05)],
)
def test_memory_against_an_exact_cache(preset: str, length: int, ratio: float) -> None:
    """Everything allocated counts: the full-precision tail, tables, and room not yet used."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    cache = OscarCache(config, OscarConfig.preset(preset))
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(1, 1, 1 << 13, 128, generator=generator).bfloat16()
    for _ in range(length // chunk.shape[2]):
        cache.update(chunk, chunk, 0)
    cache.update(chunk[:, :, :90], chunk[:, :, :90], 0)
    exact = 2 * (length + 90) * chunk[0, 0, 0].nbytes
    assert exact / cache.nbytes >= ratio


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "llama", {"num_hidden_layers": 2}, torch.nn.Linear(2, 2)])
def test_model_config_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model_config"):
        OscarCache(wrong)


@pytest.mark.parametrize("wrong", ["compact", {"key_bits": 2}, OscarConfig, 2])
def test_config_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="config"):
        OscarCache(LlamaConfig(), wrong)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mistral", "FalconH1"])
def test_model_without_a_layer_to_quantize(name: str) -> None:
    fields = {"sliding_window": 64} if name == "Mistral" else {}
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=2, **fields)
    with pytest.raises(ValueError, match="no full-attention layer"):
        OscarCache(config)


@pytest.mark.parametrize("head_dim", [4, 12, 20])
@pytest.mark.parametrize("stated", [True, False])
def test_head_dim_without_a_layout(head_dim: int, stated: bool) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": 2 * head_dim}
    if stated:
        config: Any = LlamaConfig(**heads, head_dim=head_dim, num_hidden_layers=2)
    else:
        config = transformers.GPTNeoXConfig(**heads, num_hidden_layers=2)
    with pytest.raises(ValueError, match=str(head_dim)):
        OscarCache(config)


def test_float64_model() -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar")).double()
    with pytest.raises(TypeError, match="float64"):
        model(tokens(1, 8), past_key_values=OscarCache(FAMILIES["Llama"].config()))
    model.config.dtype = torch.float64
    with pytest.raises(TypeError, match="float64"):
        OscarCache(model.config)


def test_unknown_layer_type() -> None:
    config = FAMILIES["Gemma3Text"].config()
    config.layer_types = ["telepathy", "full_attention"]
    with pytest.raises(ValueError, match="unknown layer type 'telepathy'"):
        OscarCache(config)


def test_a_pass_that_fails_in_a_hybrid_model_asks_for_a_reset() -> None:
    model = copy.deepcopy(FAMILIES["Gemma3Text"].model("oscar"))
    cache = OscarCache(model.config)
    weight = model.model.layers[1].self_attn.k_proj.weight
    kept = weight.data.clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN, Inf"):
        teacher_forced(model, tokens(1, 20), [20], cache)
    weight.data = kept
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        teacher_forced(model, tokens(1, 20), [20], cache)
    cache.reset()
    fresh = teacher_forced(model, tokens(1, 20), [20], OscarCache(model.config))
    assert torch.equal(teacher_forced(model, tokens(1, 20), [20], cache), fresh)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 300])
def test_a_pass_that_fails_between_two_updates_can_be_repeated(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["Llama"].model("oscar")
    caches = [OscarCache(model.config) for _ in range(2)]
    ids = tokens(2, length + 90)
    for cache in caches[: 2 * bool(length)]:
        model(ids[:, :length], past_key_values=cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].mlp, "forward", _no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, length : length + 7], past_key_values=caches[0])
    found, expected = (model(ids[:, length:], past_key_values=cache).logits for cache in caches)
    assert torch.equal(found, expected)


def _no_memory(states: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("injected")


@torch.no_grad()
def test_two_threads_in_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is told; the first one does not notice."""
    model = FAMILIES["Llama"].model("oscar")
    ids = tokens(2, 400)
    expected = model(ids, past_key_values=OscarCache(model.config)).logits
    cache, other = OscarCache(model.config), copy.deepcopy(model)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    with ThreadPoolExecutor(1) as pool:

        def intruded(states: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="another thread is in the middle"):
                pool.submit(other, ids, past_key_values=cache).result()
            return forward(states)

        monkeypatch.setattr(mlp, "forward", intruded)
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)
        assert cache.get_seq_length() == 400
        # between two passes another thread may go on
        pool.submit(other, ids[:, :1], past_key_values=cache).result()
        assert cache.get_seq_length() == 401


@pytest.mark.parametrize("prompt", [0, 300])
def test_an_unchecked_nan_token_poisons_no_other(prompt: int) -> None:
    """As a first prompt, and as a chunk that is attended exactly."""
    layer = OscarLayer(OscarConfig(check_finite=False))
    if prompt:
        layer.update(*states(prompt))
    keys, values = states(500, seed=1)
    keys[0, 1, 450, 3] = torch.nan
    held = layer.update(keys, values)
    query = torch.randn(2, HEADS, 500, HEAD_DIM)
    out, _ = oscar_attention_forward(torch.nn.Module(), query, *held, None)
    assert out.isfinite().all()


def test_states_of_an_earlier_update_are_refused() -> None:
    layer = OscarLayer(OscarConfig())
    layer.update(*states(300))
    old = layer.update(*states(1))
    layer.update(*states(1))
    with pytest.raises(RuntimeError, match="before the next update"):
        old[0].clone()
    with pytest.raises(RuntimeError, match="before the next update"):
        oscar_attention_forward(torch.nn.Module(), torch.randn(2, HEADS, 1, HEAD_DIM), *old, None)


@pytest.mark.parametrize("layer", [0, 1])
def test_non_finite_prompt_leaves_the_cache_as_it_was(layer: int) -> None:
    model = copy.deepcopy(FAMILIES["Llama"].model("oscar"))
    cache = OscarCache(model.config)
    ids = tokens(1, 310)
    teacher_forced(model, ids[:, :300], [300], cache)
    weight = model.model.layers[layer].self_attn.k_proj.weight
    kept = weight.data.clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN, Inf"):
        teacher_forced(model, ids[:, 300:], [10], cache)
    weight.data = kept
    assert [cache.get_seq_length(index) for index in range(len(cache))] == [300, 300]
    again = teacher_forced(model, ids[:, 300:], [10], cache)
    fresh = teacher_forced(model, ids, [300, 10], OscarCache(model.config))
    assert torch.equal(again, fresh[:, 300:])


def test_exact_caches_are_left_alone() -> None:
    """Importing the package changes nothing for those who do not ask for it."""
    model = FAMILIES["Llama"].model("sdpa")
    with torch.no_grad():
        cache = model(tokens(1, 50), use_cache=True).past_key_values
    assert type(cache) is DynamicCache
    assert not any(isinstance(layer, OscarLayer) for layer in cache.layers)


def test_view_of_tail_tokens_needs_no_copies() -> None:
    keys, _ = filled_layer().update(*states(1, seed=1))
    assert isinstance(keys, LazyStates)
    assert isinstance(keys.view_of, AttentionView)
    assert keys.view_of.new_keys is None
