"""One ``OscarLayer`` by itself: what it holds after every operation, and after bad states."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from families import page_counts
from layer_checks import HEAD_DIM, HEADS, assert_same_states, dense, filled_layer, states

from oscar_kv import OscarConfig
from oscar_kv.integrations.layer import OscarLayer


def test_first_update_returns_exact_states() -> None:
    keys, values = states(300)
    returned = OscarLayer(OscarConfig()).update(keys, values)
    assert returned[0] is keys
    assert returned[1] is values


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
    assert layer.is_croppable  # else Transformers 5.24 refuses to draft tokens
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
        wrong = keys.double(), values.double()
    else:
        index = {"batch": 0, "heads": 1, "channels": 3}[change]
        wrong = keys.narrow(index, 0, 1), values.narrow(index, 0, 1)
    with pytest.raises((ValueError, TypeError)):
        layer.update(*wrong)
    assert_same_states(layer, filled_layer())
