"""Messages with extreme values: the scheduler keeps deciding, and no figure that it publishes is infinite."""

from __future__ import annotations

from itertools import count
from math import isnan

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.policies import POLICIES
from shared.errors import MessageError
from shared.messages import (
    FARTHEST_MS,
    LONGEST_MS,
    MOST,
    SHORTEST_MS,
    CostModel,
    Heartbeat,
    Residency,
    Result,
    Slo,
    Status,
    Verify,
    decode,
    encode,
)

SESSIONS = st.sampled_from(["a", "b", "c"])
COUNTS = st.sampled_from([0, 1, 300, MOST])
LENGTHS = st.sampled_from([1, 9, 300, MOST])
TIMES = st.sampled_from([0.0, 5e-324, 1.0, 1e9, 1.7e308])
PROMISES = st.sampled_from([None, SHORTEST_MS, 50.0, LONGEST_MS])
SLACKS = st.sampled_from([None, -FARTHEST_MS, -1.0, 0.0, 50.0, FARTHEST_MS])
PRICES = st.sampled_from([0.0, 5e-324, 1.0, FARTHEST_MS])
RATIOS = st.sampled_from([5e-324, 1.0, float(MOST)])

ROUNDS = st.builds(
    Verify,
    session=SESSIONS,
    round=COUNTS,
    base_len=LENGTHS,
    draft=st.just([1, 2, 3]),
    acceptance=st.just([0.0, 1.0, 0.5]),
    drafter=st.just("d"),
    gateway=st.just("g"),
    fingerprint=st.just("f"),
    slack_ms=SLACKS,
    tpot_ms=PROMISES,
    draft_ms=TIMES,
    attempt=COUNTS,
)
RESULTS = st.builds(
    Result,
    session=SESSIONS,
    round=COUNTS,
    base_len=LENGTHS,
    status=st.sampled_from([Status.COMMITTED, Status.PREFILLED]),
    verifier=st.just("v"),
    batch=st.just("s-1"),
    tokens=st.just([1, 2]),
    cached=COUNTS,
    new_tokens=COUNTS,
    verify_ms=TIMES,
)
BEATS = st.builds(
    Heartbeat,
    verifier=st.sampled_from(["v", "w"]),
    fingerprint=st.just("f"),
    max_len=COUNTS,
    free_tokens=COUNTS,
    total_tokens=COUNTS,
    residency=st.lists(st.builds(Residency, session=SESSIONS, cached=COUNTS), max_size=3),
)
MODELS = st.builds(
    CostModel,
    verifier=st.sampled_from(["v", "w"]),
    coefficients=st.lists(PRICES, min_size=5, max_size=7),
    ratio_p50=RATIOS,
    ratio_p90=RATIOS,
    ratio_p99=RATIOS,
    samples=COUNTS,
    version=COUNTS,
)


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    messages=st.lists(st.one_of(BEATS, MODELS, ROUNDS, RESULTS), max_size=25),
)
def test_extreme_messages_do_not_stop_the_scheduler(policy: str, messages: list[object]) -> None:
    scheduler = Dispatcher("s", SchedulingRules(policy, BatchLimits(max_batch_ms=400.0, max_batch_tokens=2048)))
    clock = count(1000, 100)
    for message in messages:
        match message:
            case Heartbeat():
                scheduler.on_heartbeat(message, float(next(clock)))
            case CostModel():
                scheduler.on_cost_model(message, float(next(clock)))
            case Verify():
                scheduler.on_verify(message, float(next(clock)))
            case Result():
                scheduler.on_result(message, float(next(clock)))
        sends, wake_ms = scheduler.dispatch(float(next(clock)))
        for _, batch in sends:
            decode(encode(batch))
        decode(encode(scheduler.load(float(next(clock)))))
        assert wake_ms is None or not isnan(wake_ms)


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (Verify, "base_len", MOST + 1),
        (Verify, "tpot_ms", 1e308),
        (Verify, "slack_ms", -1e300),
        (CostModel, "ratio_p99", float("inf")),
        (CostModel, "coefficients", [1e300] * 5),
        (Heartbeat, "free_tokens", 2**63),
    ],
)
def test_a_message_beyond_the_limits_is_refused(message: type, field: str, value: object) -> None:
    whole = {
        Verify: builders.verify(),
        CostModel: builders.cost_model(),
        Heartbeat: builders.heartbeat(),
    }[message]
    with pytest.raises(MessageError, match=field):
        decode(encode(whole.model_copy(update={field: value})))


def test_an_slo_has_limits() -> None:
    Slo(ttft_ms=SHORTEST_MS, tpot_ms=LONGEST_MS)
    with pytest.raises(ValueError, match="tpot_ms"):
        Slo(ttft_ms=1.0, tpot_ms=1e308)
