"""Hidden states in messages, packed within known errors, and in the drafter, which never mixes up their rows."""

from __future__ import annotations

from typing import Any

import builders
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from services.drafter.core.hidden_rows import HiddenRows
from shared.errors import MessageError
from shared.messages import MOST, HiddenFormat, HiddenStates, decode, encode
from shared.models import hidden_states as hidden
from shared.models.bfloat16 import to_floats
from shared.models.hidden_states import Bits, Floats, pack, parts, unpack

SIZE = 3


def true_bits(count: int, version: int = 0) -> Bits:
    """Return rows for positions 0 to `count`, all different."""
    values = np.arange(count * SIZE, dtype=np.float32).reshape(count, SIZE) + 1000 * version
    return (np.sqrt(values).view(np.uint32) >> 16).astype(np.uint16)


def message(start: int, bits: Bits, form: HiddenFormat = HiddenFormat.BFLOAT16) -> HiddenStates:
    back = decode(encode(builders.hidden_states(start, bits, form)))
    assert isinstance(back, HiddenStates)
    return back


def states(start: int, stop: int, version: int = 0) -> HiddenStates:
    return message(start, true_bits(stop, version)[start:])


def same(a: Floats, b: Floats) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


row_bits = arrays.arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 9)))


@given(row_bits)
def test_bfloat16_rows_unpack_bit_for_bit(bits: Bits) -> None:
    back = unpack(message(0, bits))
    assert back.dtype == np.float32
    assert np.array_equal(back.view(np.uint32) >> 16, bits)


@given(row_bits)
def test_int8_rows_unpack_within_half_a_scale(bits: Bits) -> None:
    values = to_floats(bits)
    back = unpack(message(0, bits, HiddenFormat.INT8))
    whole = np.isfinite(values).all(axis=1) & (np.abs(values).max(axis=1) > 1e-30)
    scale = np.abs(values[whole]).max(axis=1, keepdims=True) / 127
    assert (np.abs(back[whole] - values[whole]) <= scale * 0.5001).all()
    tiny = np.isfinite(values).all(axis=1) & ~whole
    assert (np.abs(back[tiny] - values[tiny]) <= 1e-30).all()


def test_broken_rows_stay_broken_and_leave_others_intact() -> None:
    bits = np.array([[0x7FC0, 0x3F80], [0x7F80, 0x3F80], [0x3F80, 0xBF80]], np.uint16)  # NaN, infinity, 1 and -1
    with np.errstate(invalid="ignore"):
        found = unpack(builders.hidden_states(0, bits, HiddenFormat.INT8))
    assert not np.isfinite(found[:2]).all(axis=1).any()
    np.testing.assert_allclose(found[2], [1, -1])


def test_many_rows_are_split_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "PART_BYTES", 40)
    bits = true_bits(20)
    for form, most in ((HiddenFormat.BFLOAT16, 6), (HiddenFormat.INT8, 13)):
        split = list(parts(bits, 7, form))
        assert [part.start for part in split] == list(range(7, 27, most))
        assert max(len(part.rows) for part in split) <= 40
        whole, scales = pack(bits, form)
        assert b"".join(part.rows for part in split) == whole
        assert b"".join(part.scales for part in split) == scales
    monkeypatch.setattr(hidden, "PART_BYTES", 1)
    assert len(list(parts(bits, 0, HiddenFormat.BFLOAT16))) == 20, "a row is never split"


def test_rows_of_a_session_are_received_and_consumed_round_by_round() -> None:
    rows = HiddenRows(SIZE, 1000)
    assert rows.wanted(10) == 0, "all rows are missing"
    assert rows.run(10)[1].shape == (0, SIZE)
    rows.add(states(0, 11))  # the round committed tokens 10 and 11
    assert rows.wanted(12) == 11
    start, run = rows.run(12)
    assert start == 0
    assert same(run, to_floats(true_bits(11)))
    rows.need_from(11)
    assert rows.wanted(12) == 11
    assert rows.run(12)[1].shape == (0, SIZE)
    rows.add(states(11, 14))
    start, run = rows.run(15)
    assert start == 11
    assert same(run, to_floats(true_bits(14)[11:]))


def test_a_gap_is_requested_again() -> None:
    rows = HiddenRows(SIZE, 1000)
    rows.add(states(0, 10))
    rows.need_from(10)
    rows.add(states(13, 15))  # 10 to 12 were lost
    assert rows.run(16)[0] == 13
    assert rows.wanted(16) == 10
    rows.add(states(10, 17))
    assert rows.run(18)[0] == 10
    assert rows.wanted(18) == 17


def test_rows_received_before_their_result_are_kept() -> None:
    rows = HiddenRows(SIZE, 1000)
    rows.add(states(0, 14))
    start, run = rows.run(11)
    assert (start, len(run)) == (0, 10)
    assert rows.wanted(11) == 10
    assert len(rows.run(15)[1]) == 14


def test_a_session_that_lost_tokens_takes_new_rows() -> None:
    rows = HiddenRows(SIZE, 1000)
    rows.add(states(0, 20))
    rows.truncate(12)
    assert rows.wanted(12) == 11
    assert len(rows.run(13)[1]) == 12, "the row of the last token left is still right"
    rows.add(states(12, 15, version=1))
    assert same(rows.run(16)[1], to_floats(np.concatenate([true_bits(12), true_bits(15, version=1)[12:]])))
    rows.need_from(15)
    rows.truncate(8)
    assert rows.wanted(8) == 7, "of the consumed rows, only the last token's is requested again"
    rows.add(states(7, 9))
    assert rows.run(10)[0] == 7


def test_a_draft_model_that_lost_its_cache_gets_all_rows_again() -> None:
    rows = HiddenRows(SIZE, 1000)
    rows.add(states(0, 10))
    rows.need_from(9)
    rows.need_from(0)
    assert rows.wanted(11) == 0
    assert rows.run(11)[1].shape == (0, SIZE)
    rows.add(states(0, 12))
    assert same(rows.run(13)[1], to_floats(true_bits(12)))


def test_another_hidden_size_is_refused() -> None:
    with pytest.raises(MessageError, match="size 3, the draft model reads 4"):
        HiddenRows(4, 100).add(states(0, 2))


def test_positions_beyond_the_limit_take_no_memory_and_are_not_requested() -> None:
    rows = HiddenRows(SIZE, limit=50)
    rows.add(message(MOST, true_bits(2)))
    assert rows.wanted(5) == 0
    rows.add(states(0, 60))
    assert len(rows.run(51)[1]) == 50
    assert rows.run(61)[1].shape == (0, SIZE)
    assert rows.wanted(60) is None


def test_consumed_rows_are_freed() -> None:
    rows = HiddenRows(SIZE, 1000)
    for start in range(0, 5000, 5):
        rows.add(states(start, start + 5))
        rows.need_from(start + 5)
    assert rows._rows.size <= 5 * SIZE


spans = st.tuples(st.integers(0, 40), st.integers(1, 12))
events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), spans),
        st.tuples(st.just("add"), spans),
        st.tuples(st.just("drop"), st.integers(0, 45)),
        st.tuples(st.just("truncate"), st.integers(1, 45)),
        st.tuples(st.just("look"), st.integers(1, 50)),
    ),
    max_size=30,
)


@given(events)
def test_no_order_of_events_yields_a_wrong_row(happened: list[tuple[str, Any]]) -> None:
    rows = HiddenRows(SIZE, limit=48)
    texts = true_bits(60)
    expected: dict[int, Bits] = {}
    first = version = 0
    for kind, value in [*happened, ("look", 49)]:
        if kind == "add":
            start, count = value
            rows.add(message(start, texts[start : start + count]))
            expected |= {p: texts[p] for p in range(max(start, first), min(start + count, 48))}
        elif kind == "drop":
            rows.need_from(value)
            expected = {} if value < first else {p: row for p, row in expected.items() if p >= value}
            first = value
        elif kind == "truncate":
            rows.truncate(value)
            version += 1
            texts = np.concatenate([texts[:value], true_bits(60, version)[value:]])
            if value <= first:
                first = value - 1
            expected = {p: row for p, row in expected.items() if p < value}
        else:
            start, run = rows.run(value)
            assert start + len(run) == value - 1
            assert same(run, to_floats(np.array([expected[p] for p in range(start, value - 1)]).reshape(-1, SIZE)))
            assert start - 1 not in expected, "the run is the longest"
            wanted = rows.wanted(value)
            if wanted is not None:
                assert wanted >= first
                assert wanted not in expected or wanted == max(first, value - 1)
                assert all(p in expected for p in range(first, wanted))
