"""Checks on the rounds of remote devices: no device gains at the expense of other sessions."""

from __future__ import annotations

from typing import Any

import pytest
from builders import verify
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.core.device_gate import HIDDEN_ROWS, LONGEST_DRAFT, DeviceGate, RateBucket, RoundRefused
from shared.broker.session_keys import SessionKeys
from shared.messages import Cancel, Verify

KEYS = SessionKeys("x" * 32)


def round_(session: str = "s", tpot_ms: float | None = None, **fields: Any) -> Verify:
    plain = {
        "base_len": 100,
        "draft": [1, 2],
        "drafter": "device.ann",
        "session_key": KEYS.key(session, "g", "default", tpot_ms),
    }
    return verify(session, tpot_ms=tpot_ms, **(plain | fields))


@pytest.fixture
def gate() -> DeviceGate:
    return DeviceGate("ann", KEYS, rounds_per_s=10)


def test_an_honest_round_passes_as_it_is(gate: DeviceGate) -> None:
    honest = round_(tpot_ms=50.0, slack_ms=400.0, hidden_from=90)
    assert gate.check(honest, due_ms=1400.0, now_ms=1000.0) == honest


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Cancel(session="s", reason="r"), "a Cancel is no round"),
        (round_(drafter="device.bob"), "would go to device.bob"),
        (round_(drafter="gateway-1"), "would go to gateway-1"),
        (round_(session_key=""), "session key"),
        (round_(session_key=KEYS.key("other", "g", "default", None)), "session key"),
        (round_(service_class="priority"), "session key"),
        (round_(draft=[1] * (LONGEST_DRAFT + 1)), "65 tokens"),
    ],
)
def test_a_round_that_the_device_may_not_send_is_refused(gate: DeviceGate, message: Verify, reason: str) -> None:
    with pytest.raises(RoundRefused, match=reason):
        gate.check(message, None, 0.0)


def test_a_device_cannot_claim_to_be_late(gate: DeviceGate) -> None:
    liar = round_(tpot_ms=50.0, slack_ms=-1e9)
    assert gate.check(liar, due_ms=None, now_ms=1000.0).slack_ms == 0.0
    assert gate.check(liar, due_ms=1300.0, now_ms=1000.0).slack_ms == 300.0
    assert gate.check(liar, due_ms=900.0, now_ms=1000.0).slack_ms == -100.0
    without_slo = round_(slack_ms=-1e9)
    assert gate.check(without_slo, None, 0.0).slack_ms is None


def test_hidden_states_are_limited_to_the_needs_of_a_device(gate: DeviceGate) -> None:
    greedy = round_(base_len=8000, hidden_from=0)
    answered = [gate.check(greedy, None, 0.0).hidden_from for _ in range(5)]
    assert answered.count(0) == HIDDEN_ROWS // 8003
    assert answered[-1] is None
    assert gate.check(greedy, None, 20_000.0).hidden_from == 0
    assert gate.check(round_(), None, 0.0).hidden_from is None


def test_rounds_above_the_rate_wait(gate: DeviceGate) -> None:
    assert [gate.wait_ms(0.0) for _ in range(10)] == [0.0] * 10
    assert [gate.wait_ms(0.0) for _ in range(2)] == pytest.approx([100.0, 200.0])
    assert gate.wait_ms(1300.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 500)), max_size=60))
def test_a_bucket_gives_no_more_than_its_level_and_rate(asked: list[tuple[float, float]]) -> None:
    bucket, now_ms, given_out = RateBucket(per_s=20, most=30), 0.0, 0.0
    for amount, pause_ms in asked:
        now_ms += pause_ms
        if bucket.take(amount, now_ms):
            given_out += amount
        assert given_out <= 30 + 20 * now_ms / 1000 + 1e-6
