"""The load benchmark: records of streams, and the measures of points."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.drafter.core.session import wasted_tokens
from services.tools.bench.load.core.measures import Window, lag_of, measure, quantile, quantiles
from services.tools.bench.load.core.record import Ending, RequestRecord, record_of, refusal_of
from services.tools.bench.load.core.requests import LoadRequest
from shared.cost.model import FALLBACK, predict_ms, shape_of
from shared.messages import Measurement, Slo

SLO = Slo(ttft_ms=100, tpot_ms=20)
ASKED = LoadRequest(
    session=1, number=2, messages=[{"role": "user", "content": "Hi"}], max_tokens=9, service_class="fast", slo=SLO
)
WINDOW = Window(warm_up_s=10, measure_s=20, drain_s=5)
TIMES: dict[str, Any] = {"start_s": 12.0, "lag_ms": 0.5, "total_ms": 300.0}


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode()


def chunk(text: str, tokens: int | None = None, finish: str | None = None, **trace: Any) -> bytes:
    if tokens is not None:
        trace["tokens"] = [{"id": i, "text": "x", "draft": False} for i in range(tokens)]
    return event(
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": None, "wisp": trace}
    )


def one_round(start: int, drafted: int, verified: int, accepted: int, **times: float) -> dict[str, Any]:
    return {
        "round": 0, "start": start, "tokens": accepted + 1, "drafted": drafted, "verified": verified,
        "accepted": accepted, "draft_ms": 0.0, "queue_ms": 0.0, "verify_ms": 0.0,
    } | times  # fmt: skip


def record(**fields: Any) -> RequestRecord:
    known: dict[str, Any] = {
        "session": 0, "number": 0, "service_class": "fast", "device": "", "slo": SLO, "start_s": 12.0, "lag_ms": 0.0,
        "ending": Ending.COMPLETE, "total_ms": 300.0, "tokens": 3, "arrivals": [(80.0, 1), (110.0, 2)],
    }  # fmt: skip
    return RequestRecord(**known | fields)


def test_a_stream_becomes_tokens_times_rounds_and_a_summary() -> None:
    rounds = [one_round(0, 2, 2, 1), one_round(2, 3, 3, 0)]
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    events = [
        (90.0, event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})),
        (90.0, chunk("Hel", 2, rounds=[rounds[0]])),
        (140.0, chunk("lo", 1)),
        (150.0, chunk("", finish="stop", rounds=[rounds[1]])),
        (151.0, event({"choices": [], "usage": usage, "wisp": {"summary": {"rounds": 2}}})),
        (151.0, b"data: [DONE]"),
    ]
    found = record_of(ASKED, events, **TIMES)
    assert found.ending is Ending.COMPLETE
    assert found.arrivals == [(90.0, 2), (140.0, 1)]
    assert (found.prompt_tokens, found.tokens, found.finish) == (7, 3, "stop")
    assert (found.rounds, found.summary) == (rounds, {"rounds": 2})
    assert (found.ttft_ms, found.tpot_ms) == (90.0, 25.0)
    assert not found.attained
    assert RequestRecord.model_validate_json(found.model_dump_json()) == found


def test_a_server_without_trace_sends_a_token_per_chunk() -> None:
    plain = event({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]})
    last = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    found = record_of(ASKED, [(50.0, plain), (60.0, plain), (60.0, last)], **TIMES)
    assert (found.tokens, found.tpot_ms, found.attained) == (2, 10.0, True)


def test_without_a_requested_slo_the_servers_slo_counts() -> None:
    end = event({"choices": [], "wisp": {"summary": {"slo": {"ttft_ms": 40.0, "tpot_ms": 5.0}}}})
    events = [(50.0, chunk("x", 1, finish="stop")), (50.0, end)]
    assert record_of(ASKED.model_copy(update={"slo": None}), events, **TIMES).slo == Slo(ttft_ms=40, tpot_ms=5)
    assert record_of(ASKED, events, **TIMES).slo == SLO


@pytest.mark.parametrize(
    ("events", "options", "ending", "reason"),
    [
        ([chunk("x", 1), event({"error": {"message": "gone", "code": "session_gone"}})], {}, Ending.ERROR, "gone"),
        ([chunk("x", 1)], {}, Ending.ERROR, "the stream ended without a finish reason"),
        ([chunk("x", 1)], {"reason": "ReadError: x"}, Ending.ERROR, "ReadError: x"),
        ([chunk("x", 1)], {"cut": True}, Ending.CUT, ""),
    ],
)
def test_a_broken_stream_does_not_attain(
    events: list[bytes], options: dict[str, Any], ending: Ending, reason: str
) -> None:
    found = record_of(ASKED, [(10.0, one) for one in events], **options, **TIMES)
    assert (found.ending, found.reason, found.attained) == (ending, reason, False)
    assert found.ttft_ms == 10.0


def test_a_refusal_keeps_its_reason_and_retry_time() -> None:
    body = json.dumps({"error": {"message": "too busy", "code": "overloaded"}}).encode()
    refused = refusal_of(ASKED, 429, {"retry-after": "3"}, body, **TIMES)
    assert (refused.ending, refused.reason, refused.retry_after_s) == (Ending.REFUSED, "429 overloaded: too busy", 3.0)
    assert (refused.attained, refused.ttft_ms) == (False, None)
    broken = refusal_of(ASKED, 502, {}, b"<html>", **TIMES)
    assert (broken.ending, broken.reason, broken.retry_after_s) == (Ending.ERROR, "502: <html>", None)


def test_attainment_needs_both_times() -> None:
    assert record().attained
    assert not record(arrivals=[(101.0, 1), (110.0, 2)]).attained
    assert not record(arrivals=[(80.0, 1), (130.0, 2)]).attained
    assert record(slo=None, arrivals=[(9000.0, 3)]).attained
    assert record(tokens=0, arrivals=[], total_ms=99.0).attained
    assert not record(tokens=0, arrivals=[], total_ms=101.0).attained


def test_requests_due_in_the_window_count_however_they_end() -> None:
    found = measure(
        [
            record(start_s=9.9),
            record(start_s=10.0),
            record(start_s=29.9, ending=Ending.CUT),
            record(start_s=20.0, ending=Ending.REFUSED, arrivals=[], tokens=0, reason="429 overloaded: later"),
            record(start_s=20.0, service_class="slow", arrivals=[(500.0, 3)]),
            record(start_s=30.0),
        ],
        WINDOW,
    )
    assert (found.requests, found.complete, found.attained, found.refused, found.cut) == (4, 2, 1, 1, 1)
    assert found.attainment == 0.25
    assert (found.classes["fast"].requests, found.classes["fast"].attained, found.classes["fast"].refused) == (3, 1, 1)
    assert found.classes["slow"].attainment == 0.0
    assert found.reasons == {"429 overloaded": 1}
    assert (found.drafting, found.interference, found.batches) == (None, None, None)


def test_tokens_per_second_count_arrivals_in_the_window() -> None:
    found = measure(
        [
            record(start_s=9.95, arrivals=[(40.0, 1), (60.0, 2)]),
            record(start_s=29.95, arrivals=[(40.0, 1), (60.0, 2)]),
            record(start_s=20.0, arrivals=[(900.0, 3)]),
        ],
        WINDOW,
    )
    assert found.throughput == (2 + 1 + 3) / 20
    assert found.goodput == (2 + 1) / 20


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_tokens_after_the_first_rejected_one_are_wasted(a: int, b: int, c: int) -> None:
    accepted, verified, drafted = sorted((a, b, c))
    lost = wasted_tokens(drafted, verified, accepted)
    assert lost == (0 if accepted == verified else drafted - accepted - 1)
    assert 0 <= lost <= drafted


def test_drafts_are_summed_over_counted_requests() -> None:
    rounds = [
        one_round(0, 4, 4, 1, draft_ms=40.0),
        one_round(2, 4, 2, 2, draft_ms=20.0),
        one_round(5, 0, 0, 0),
        one_round(6, 1, 1, 0, draft_ms=20.0),
    ]
    found = measure([record(rounds=rounds), record(start_s=1.0, rounds=rounds)], WINDOW).drafting
    assert found is not None
    assert (found.rounds, found.drafted, found.verified, found.accepted, found.trimmed) == (4, 9, 7, 3, 2)
    assert found.acceptance == 3 / 7
    assert found.tokens_per_round == 7 / 4
    assert found.wdt_share == pytest.approx(40.0 * 2 / 4 / 80.0)


def test_interference_is_time_in_the_batch_minus_time_alone() -> None:
    alone = predict_ms(FALLBACK, shape_of([(4, 7 + 2 + 3, 4)]))
    rounds = [
        one_round(0, 0, 0, 0, verify_ms=900.0),
        one_round(2, 3, 3, 1, verify_ms=alone + 30),
        one_round(2, 3, 3, 1, verify_ms=alone - 10),
        one_round(2, 3, 3, 1, verify_ms=0.0),
    ]
    found = measure([record(prompt_tokens=7, rounds=rounds)], WINDOW, [FALLBACK]).interference
    assert found is not None
    assert (found.rounds, found.mean_ms, found.p90_ms) == (2, pytest.approx(10.0), pytest.approx(26.0))


def test_batches_are_summed_up() -> None:
    batches = [Measurement(shape=shape_of([(5, 50, 5)] * jobs), measured_ms=50.0 * jobs) for jobs in (1, 3)]
    found = measure([], WINDOW, [], batches).batches
    assert found is not None
    assert (found.count, found.jobs, found.tokens, found.ms, found.ms_p90) == (
        2,
        2.0,
        10.0,
        100.0,
        pytest.approx(140.0),
    )


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_among_its_values_and_rises_with_its_share(values: list[float], share: float) -> None:
    assert min(values) <= quantile(values, 0.0) <= quantile(values, share) * (1 + 1e-12)
    assert quantile(values, share) <= quantile(values, 1.0) * (1 + 1e-12)
    assert quantile(values, 1.0) == max(values)


def test_quantiles_are_linear_between_values() -> None:
    found = quantiles([None, 4.0, 1.0, 2.0, 3.0, 5.0])
    assert found is not None
    assert (found.p50, found.p90, found.p99) == (3.0, pytest.approx(4.6), pytest.approx(4.96))
    assert quantiles([None]) is None


@pytest.mark.parametrize(("sent", "loop", "late"), [(1.0, 1.0, False), (60.0, 1.0, True), (1.0, 60.0, True)])
def test_a_late_generator_is_a_bottleneck(sent: float, loop: float, late: bool) -> None:
    assert lag_of([sent] * 10, [loop] * 10, 0.1).bottleneck is late
    assert not lag_of([], [], 0.0).bottleneck
