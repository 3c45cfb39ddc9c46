"""PackedKV: append in any chunking, crop, select, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states import states
from torch import Tensor

from oscar_kv import OscarConfig, PackedKV, quantize
from oscar_kv.kernels import append
from oscar_kv.storage.codec import encode_into

CONFIGS = {
    "compact": OscarConfig.compact(),
    "paper": OscarConfig.paper(),
    "window and sinks": dataclasses.replace(OscarConfig.quality(), recent_tokens=40, sink_tokens=7),
}
configs = st.sampled_from(list(CONFIGS.values()))
TOKENS = 900
KEYS, VALUES = states("norm_imbalance", 2, 2, TOKENS, 16)


def empty(config: OscarConfig, batch_size: int = 2) -> PackedKV:
    return PackedKV(config, batch_size=batch_size, num_kv_heads=2, head_dim=16)


def filled(config: OscarConfig, tokens: int) -> PackedKV:
    return quantize(KEYS[:, :, :tokens], VALUES[:, :, :tokens], config)


def assert_same(a: PackedKV, b: PackedKV) -> None:
    """Bit for bit the same sequences, whatever the page ids."""
    assert a.lengths == b.lengths
    assert a.pages_per_sequence == b.pages_per_sequence
    assert torch.equal(a.page_counts, b.page_counts)
    assert torch.equal(a.tail_lengths, b.tail_lengths)
    assert torch.equal(a.sink_lengths, b.sink_lengths)
    for row, count in enumerate(a.pages_per_sequence):
        pages = [p.pool.data[p.block_table[row, :count]] for p in (a, b)]
        assert torch.equal(*pages)
    for x, y in zip(a.dense(), b.dense()):
        assert torch.equal(x, y)


@given(configs, st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_append_in_any_chunking_gives_the_same_cache(
    config: OscarConfig, chunks: list[int]
) -> None:
    packed, done = empty(config), 0
    for chunk in chunks:
        end = min(done + chunk, TOKENS)
        packed.append(KEYS[:, :, done:end], VALUES[:, :, done:end])
        done = end
    assert packed.lengths == [done, done]
    assert_same(packed, filled(config, done))


@given(configs, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=5))
def test_ragged_appends_equal_separate_sequences(
    config: OscarConfig, chunks: list[tuple[int, int]]
) -> None:
    packed, done = empty(config), [0, 0]
    for chunk in chunks:
        counts = [min(c, TOKENS - d) for c, d in zip(chunk, done)]
        new_keys, new_values = torch.full((2, 2, 2, max(counts), 16), torch.nan)
        for row, (d, c) in enumerate(zip(done, counts)):
            new_keys[row, :, :c] = KEYS[row, :, d : d + c]
            new_values[row, :, :c] = VALUES[row, :, d : d + c]
        packed.append(new_keys, new_values, lengths=counts)
        done = [d + c for d, c in zip(done, counts)]
    assert packed.lengths == done
    for row, length in enumerate(done):
        alone = quantize(KEYS[row : row + 1, :, :length], VALUES[row : row + 1, :, :length], config)
        for x, y in zip(packed.dense(), alone.dense()):
            assert torch.equal(x[row : row + 1, :, :length], y)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_where_each_token_is(config: OscarConfig) -> None:
    """Sinks and tail are exact, pages are not, and the tail stays within its bounds."""
    for tokens in (1, 6, 7, 40, 127, 128, 174, 175, 255, 256, 384, 899):
        packed = filled(config, tokens)
        sinks = min(tokens, config.sink_tokens)
        tail = packed.tails_per_sequence[0]
        pages = packed.pages_per_sequence[0]
        assert sinks + 128 * pages + tail == tokens
        assert tail < config.recent_tokens + 128
        assert pages == 0 or tail >= config.recent_tokens
        read, exact = packed.dense()[0], KEYS[:, :, :tokens]
        assert torch.equal(read[:, :, :sinks], exact[:, :, :sinks])
        assert torch.equal(read[:, :, tokens - tail :], exact[:, :, tokens - tail :])
        if pages:
            middle = slice(sinks, tokens - tail)
            assert not torch.equal(read[:, :, middle], exact[:, :, middle])


@given(configs, st.integers(0, TOKENS), st.integers(0, 300), st.data())
def test_crop_within_the_tail_equals_never_having_appended(
    config: OscarConfig, tokens: int, more: int, data: st.DataObject
) -> None:
    packed = filled(config, tokens)
    keep = data.draw(st.integers(tokens - packed.tails_per_sequence[0], tokens))
    packed.crop(keep)
    expected = filled(config, keep)
    if packed.pages_per_sequence == expected.pages_per_sequence:
        assert_same(packed, expected)
    end = min(keep + more, TOKENS)
    packed.append(KEYS[:, :, keep:end], VALUES[:, :, keep:end])
    whole = filled(config, end)
    if packed.pages_per_sequence == whole.pages_per_sequence:
        assert_same(packed, whole)
    else:  # pages that a rollback leaves stay packed, though their window is gone
        assert packed.pages_per_sequence > whole.pages_per_sequence
        assert packed.lengths == whole.lengths


@given(configs, st.integers(0, TOKENS), st.data())
def test_crop_into_pages_keeps_whole_pages_and_restores_the_cut_one(
    config: OscarConfig, tokens: int, data: st.DataObject
) -> None:
    packed = filled(config, tokens)
    before = packed.dense()
    pages = packed.pages_per_sequence[0]
    keep = data.draw(st.integers(0, tokens))
    packed.crop(keep)
    assert packed.lengths == [keep, keep]
    for old, new in zip(before, packed.dense()):
        assert torch.equal(old[:, :, :keep], new)
    sinks = min(config.sink_tokens, keep)
    assert packed.pages_per_sequence[0] == min(pages, (keep - sinks) // 128)
    packed.append(KEYS[:, :, keep:tokens], VALUES[:, :, keep:tokens])
    assert packed.lengths == [tokens, tokens]


def test_crop_each_sequence_to_its_own_length() -> None:
    packed = filled(OscarConfig.paper(), 700)
    before = packed.dense()[0]
    packed.crop([130, 650])
    assert packed.lengths == [130, 650]
    keys = packed.dense()[0]
    assert torch.equal(keys[0, :, :130], before[0, :, :130])
    assert torch.equal(keys[1, :, :650], before[1, :, :650])
    assert not keys[0, :, 130:].any()


@given(
    configs,
    st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=4), min_size=1, max_size=4),
)
def test_select_follows_beams(config: OscarConfig, choices: list[list[int]]) -> None:
    """Beams that split, merge and die read like sequences that were never shared."""
    packed = filled(config, 600)
    history = [[row] for row in range(2)]
    done = 600
    for step, choice in enumerate(choices):
        choice = [row % packed.batch_size for row in choice]
        packed.select(choice)
        history = [[*history[row], step] for row in choice]
        new_keys, new_values = states("gaussian", len(choice), 2, 70, 16, seed=step)
        packed.append(new_keys, new_values)
        done += 70
        history = [[*h[:-1], (h[-1], slot)] for slot, h in enumerate(history)]  # pyright: ignore
    for row, path in enumerate(history):
        keys, values = KEYS[path[0], :, :600], VALUES[path[0], :, :600]
        for step, slot in path[1:]:  # pyright: ignore[reportGeneralTypeIssues]
            new_keys, new_values = states("gaussian", len(choices[step]), 2, 70, 16, seed=step)
            keys = torch.cat([keys, new_keys[slot]], 1)
            values = torch.cat([values, new_values[slot]], 1)
        alone = quantize(keys[None], values[None], config)
        assert alone.lengths == [done]
        for x, y in zip(packed.dense(), alone.dense()):
            assert torch.equal(x[row : row + 1], y)


def test_beams_share_pages_and_free_them() -> None:
    packed = filled(OscarConfig.paper(), 512)
    assert packed.pool.used == 8
    packed.select([0, 0, 0, 1])
    assert packed.pool.used == 8
    packed.select([1, 2])
    assert packed.pool.used == 4
    capacity = packed.pool.capacity
    packed.append(KEYS[:, :, :256], VALUES[:, :, :256])
    assert packed.pool.used == 8
    assert packed.pool.capacity == capacity  # freed pages are used again
    packed.reset()
    assert packed.pool.used == 0
    assert packed.lengths == [0, 0]
    packed.append(KEYS[:, :, :512], VALUES[:, :, :512])
    assert_same(packed, filled(OscarConfig.paper(), 512))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_token_is_quantized_once(config: OscarConfig) -> None:
    seen: list[Tensor] = []

    def pack(
        pool: Tensor, page_ids: Tensor, keys: Tensor, values: Tensor, layout: Any, *, pages: int
    ) -> None:
        seen.append(keys[0, :, : 128 * pages].transpose(0, 1))
        encode_into(pool, page_ids, keys, values, layout, pages=pages)

    packed = empty(config, batch_size=1)
    for token in range(700):
        chunk = slice(token, token + 1)
        packed.append(KEYS[:1, :, chunk], VALUES[:1, :, chunk], pack=pack)
    quantized = torch.cat(seen).transpose(0, 1)  # [H, tokens, D]
    begin = config.sink_tokens
    assert torch.equal(quantized, KEYS[0, :, begin : begin + quantized.shape[1]])


def test_growth_leaves_little_unused() -> None:
    config = OscarConfig.compact()
    packed = empty(config, 1)
    keys, values = states("gaussian", 1, 2, 20_000, 16)
    packed.append(keys, values)
    assert packed.pool.capacity == packed.pool.used
    for begin in range(0, 4096, 128):
        packed.append(keys[:, :, begin : begin + 128], values[:, :, begin : begin + 128])
        assert packed.pool.capacity <= packed.pool.used * 33 / 32 + 1


def test_memory_counts_every_byte() -> None:
    packed = filled(CONFIGS["window and sinks"], 500)
    tensors = [
        packed.pool.data,
        packed.tail_keys,
        packed.tail_values,
        packed.sink_keys,
        packed.sink_values,
        packed.block_table,
        packed.page_counts,
        packed.tail_lengths,
        packed.sink_lengths,
        packed.arrivals,
    ]
    assert packed.nbytes == sum(t.numel() * t.itemsize for t in tensors)
    assert packed.memory()["tail"] == 2 * 2 * 2 * 16 * 4 * (packed.tails_per_sequence[0] + 7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nonfinite_states_are_refused_and_nothing_is_lost(bad: float, which: int) -> None:
    packed = filled(OscarConfig.compact(), 300)
    before = packed.memory()
    new = [KEYS[:, :, 300:600].clone(), VALUES[:, :, 300:600].clone()]
    new[which][1, 0, 7, 3] = bad
    with pytest.raises(
        ValueError, match=r"NaN, Inf .* first in sequence 1, KV head 0, new token 7"
    ):
        packed.append(*new)
    assert packed.memory() == before
    assert_same(packed, filled(OscarConfig.compact(), 300))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_unchecked_nonfinite_tokens_become_zeros_and_poison_nobody(bad: float) -> None:
    config = OscarConfig(check_finite=False)
    keys, values = KEYS[:, :, :600].clone(), VALUES[:, :, :600].clone()
    keys[0, 1, 50, 3] = bad
    values[0, 1, 590, 2] = bad
    read_keys, read_values = quantize(keys, values, config).dense()
    zeroed = keys.clone(), values.clone()
    for states_ in zeroed:
        states_[0, 1, [50, 590]] = 0
    expected = quantize(*zeroed, config).dense()
    assert torch.equal(read_keys, expected[0])
    assert torch.equal(read_values, expected[1])
    assert not read_keys[0, 1, 50].any()


@pytest.mark.parametrize("config", [OscarConfig.compact(), OscarConfig.paper()])
def test_numbers_too_large_for_the_metadata_are_refused(config: OscarConfig) -> None:
    packed = filled(config, 10)
    with pytest.raises(ValueError, match="too large for fp"):
        packed.append(KEYS[:, :, :20] * 1e6, VALUES[:, :, :20])
    limit = 65504 / 16  # cross-head norm over 2 x 16 channels
    packed.append(KEYS[:, :, :300].clamp(-1, 1) * limit, VALUES[:, :, :300].clamp(-1, 1) * 6e4)
    assert all(states_.isfinite().all() for states_ in packed.dense())


def test_float16_stays_finite_through_crops_and_appends() -> None:
    keys, values = (states_.clamp(-3, 3).half() * 2e4 for states_ in (KEYS, VALUES))
    packed = quantize(keys[:, :, :600], values[:, :, :600])
    packed.crop(100)
    packed.append(keys[:, :, :500], values[:, :, :500])
    assert all(states_.isfinite().all() for states_ in packed.dense())


def test_a_cache_made_in_inference_mode_is_an_ordinary_one() -> None:
    with torch.inference_mode():
        packed = quantize(KEYS[:, :, :300], VALUES[:, :, :300])
    packed.append(KEYS[:, :, 300:600].requires_grad_(), VALUES[:, :, 300:600])
    assert not packed.tail_keys.requires_grad
    assert_same(packed, filled(OscarConfig.compact(), 600))


def test_moving_copies_the_bookkeeping() -> None:
    packed = filled(OscarConfig.paper(), 300)
    moved = packed.to("cpu")
    moved.append(KEYS[:, :, 300:600], VALUES[:, :, 300:600])
    assert packed.lengths == [300, 300]
    assert_same(moved, filled(OscarConfig.paper(), 600))


def test_a_failing_pack_leaves_the_cache_as_it_was() -> None:
    packed = filled(OscarConfig.compact(), 300)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        packed.append(KEYS[:, :, :300], VALUES[:, :, :300], pack=fail)
    assert_same(packed, filled(OscarConfig.compact(), 300))


REFUSED: dict[str, tuple[type[Exception], str, Callable[[PackedKV], object]]] = {
    "heads": (ValueError, "keys of shape", lambda p: p.append(KEYS[:, :1], VALUES)),
    "batch": (ValueError, "keys of shape", lambda p: p.append(KEYS[:1], VALUES[:1])),
    "tokens": (ValueError, "values of shape", lambda p: p.append(KEYS, VALUES[:, :, 1:])),
    "channels": (ValueError, "keys of shape", lambda p: p.append(KEYS[..., 1:], VALUES)),
    "dims": (ValueError, "keys of shape", lambda p: p.append(KEYS[0], VALUES[0])),
    "dtype": (TypeError, "float16.*float32", lambda p: p.append(KEYS.half(), VALUES.half())),
    "device": (ValueError, "meta", lambda p: p.append(KEYS.to("meta"), VALUES)),
    "lengths": (ValueError, "lengths=", lambda p: p.append(KEYS, VALUES, lengths=[1, 901])),
    "few lengths": (ValueError, "lengths=", lambda p: p.append(KEYS, VALUES, lengths=[1])),
    "crop up": (ValueError, "lengths=301", lambda p: p.crop(301)),
    "crop down": (ValueError, "lengths=-1", lambda p: p.crop(-1)),
    "crop count": (ValueError, "lengths=", lambda p: p.crop([1, 2, 3])),
    "select": (ValueError, "rows=", lambda p: p.select([0, 2])),
    "crop to a fraction": (TypeError, "expected integers", lambda p: p.crop([299.0, 300])),  # pyright: ignore
    "select a fraction": (TypeError, "expected integers", lambda p: p.select([0, 1.9])),  # pyright: ignore
    "select nothing": (ValueError, "rows=", lambda p: p.select([])),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_and_nothing_is_lost(
    case: tuple[type[Exception], str, Callable[[PackedKV], object]],
) -> None:
    error, message, call = case
    packed = filled(OscarConfig.compact(), 300)
    with pytest.raises(error, match=message):
        call(packed)
    assert_same(packed, filled(OscarConfig.compact(), 300))


def test_bad_construction() -> None:
    with pytest.raises(TypeError, match="config is a str"):
        quantize(KEYS, VALUES, "compact")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="float64"):
        quantize(KEYS.double(), VALUES.double())
    with pytest.raises(ValueError, match="head_dim=20"):
        quantize(torch.zeros(1, 1, 4, 20), torch.zeros(1, 1, 4, 20))
    with pytest.raises(ValueError, match="keys="):
        quantize(KEYS[0], VALUES[0])
    with pytest.raises(ValueError, match="batch_size=0"):
        empty(OscarConfig(), 0)


def test_reserved_tokens_are_counted_and_given_up() -> None:
    packed = filled(OscarConfig.compact(), 300)
    used, room = packed.pool.used, packed.tail_keys.shape[2]
    with pytest.raises(ValueError, match="0 are reserved"):
        packed.advance(1)
    packed.reserve(10)  # the tail has room for them: no page is needed
    assert packed.pool.used == used
    # a kernel may fill the tail before the host hears of it
    assert packed.most_tail_tokens == room
    packed.reserve(500)
    before = packed.nbytes
    packed.advance(400)
    assert packed.lengths == [700, 700]
    assert packed.nbytes == before
    with pytest.raises(ValueError, match="are reserved"):
        packed.advance(400)
    with pytest.raises(ValueError, match="tokens=-1"):
        packed.reserve(-1)
    packed.crop(700)
    assert packed.pool.used == sum(packed.pages_per_sequence)
    assert packed.most_tail_tokens == max(packed.tails_per_sequence)


@pytest.mark.parametrize("preset", ["compact", "paper"])
@pytest.mark.parametrize("chunks", [[10, 5, 5], [20, 1], [5, 300, 1], [15, 100, 13, 1, 128]])
def test_short_sequences_take_no_more_than_they_need(preset: str, chunks: list[int]) -> None:
    """Where their length is known before; if they outgrow it, nothing is lost."""
    config = OscarConfig.preset(preset)
    keys, values = states("gaussian", 2, 2, sum(chunks), 32)

    def empty(max_tokens: int | None) -> PackedKV:
        return PackedKV(config, batch_size=2, num_kv_heads=2, head_dim=32, max_tokens=max_tokens)

    told, untold = empty(20), empty(None)
    assert told.nbytes < untold.nbytes / 3
    for begin, part in zip(itertools.accumulate([0, *chunks]), keys.split(chunks, 2)):
        new = part, values[:, :, begin : begin + part.shape[2]]
        for packed in (told, untold):
            append(packed, *new)
        assert told.lengths == untold.lengths
        assert told.pages_per_sequence == untold.pages_per_sequence
        for one, other in zip(told.dense(), untold.dense()):
            assert torch.equal(one, other)
        if max(told.lengths) <= 20:
            assert told.memory()["unused"] == 2 * 2 * 2 * 32 * 4 * (20 - told.max_length)
    told.crop(3)
    untold.crop(3)
    for one, other in zip(told.dense(), untold.dense()):
        assert torch.equal(one, other)
