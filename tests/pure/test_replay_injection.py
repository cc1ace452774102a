"""Injection: the requests it sends, the targets it refuses, and the comparison of the texts."""

from __future__ import annotations

import pytest
import recorded
from recorded import A

from services.tools.replayer.core.injection import InjectedRequest, injectable_requests, injection_report
from services.tools.replayer.core.performance import ServedRequest
from services.tools.replayer.core.recording import RecordingError, RecordingSource
from services.tools.replayer.inject import in_vhost, refuse_live
from shared.messages import Cancel, Failure, Finish, Status

LIVE = RecordingSource("suite", "/", "10.0.0.1:5672", "rabbit@one")


def injected() -> InjectedRequest:
    [request] = injectable_requests(recorded.recording(recorded.sent()))
    return InjectedRequest(request, "inject-1-a", ServedRequest("inject-1-a", request.generate.slo, "default", 0.0))


def test_requests_come_with_their_recorded_texts_and_times() -> None:
    cancel = (152.0, "cancel", Cancel(session=A, reason="client left"))
    [request] = injectable_requests(recorded.recording([*recorded.sent(), cancel]))
    assert (request.key, request.generate) == ("generate.pool", recorded.generate())
    assert (request.at_ms, request.cancel_ms) == (recorded.START_MS + 5, recorded.START_MS + 152)
    assert request.output == [11, 12, 99]
    assert (request.ttft_ms, request.tpot_ms) == (60, 45)


def test_the_same_text_in_other_rounds_does_not_differ() -> None:
    request = injected()
    request.apply(recorded.result(A, 0, 3, "x-1", [11, 12]), 80.0)
    request.apply(recorded.result(A, 0, 3, "x-1", [11, 12]), 85.0)  # a copy
    request.apply(recorded.result(A, 1, 5, "x-2", [99], finish=Finish.LENGTH), 120.0)
    report = injection_report([request], late_ms=2.0)
    assert (report.compared, report.differing, report.ended) == (3, [], {"length": 1})
    assert report.ttft_p50_ms == (60, 80)
    assert report.tpot_p50_ms == (45, 20)


def test_a_different_token_is_reported_by_position() -> None:
    request = injected()
    request.apply(recorded.result(A, 0, 3, "x-1", [11, 13]), 80.0)
    report = injection_report([request], late_ms=0.0)
    assert report.differing == [(A, 4)]
    assert report.ended == {"unfinished": 1}


def test_a_text_that_ended_earlier_is_compared_as_far_as_it_goes() -> None:
    request = injected()
    request.apply(recorded.result(A, 0, 3, "x-1", [11]), 80.0)
    failure = Failure(code="other_model", message="no")
    request.apply(recorded.result(A, 1, 4, "x-2", [], status=Status.FAILED, error=failure), 90.0)
    report = injection_report([request], late_ms=0.0)
    assert (report.compared, report.differing, report.ended) == (1, [], {"other_model": 1})
    assert report.ttft_p50_ms == (None, None), "only of texts that came to their end"


def test_the_live_virtual_host_is_refused() -> None:
    for own, other in (("amqp://u:p@h:1/", "/"), ("amqp://u:p@h:1/live", "live"), ("amqp://u:p@h:1/a%2Fb", "a/b")):
        with pytest.raises(RecordingError, match="so it is the live one"):
            in_vhost(own, other)
    assert in_vhost("amqp://u:p@h:1/", "debug") == "amqp://u:p@h:1/debug"
    assert in_vhost("amqp://u:p@h:1/live", "a/b") == "amqp://u:p@h:1/a%2Fb"


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        (LIVE, True),
        (RecordingSource("other", "/", "10.0.0.1:5672", "rabbit@renamed"), True),  # the namespace does not matter
        (RecordingSource("suite", "/", "proxy:5672", "rabbit@one"), True),  # the same broker under another address
        (RecordingSource("suite", "debug", "10.0.0.1:5672", "rabbit@one"), False),
        (RecordingSource("suite", "/", "10.0.0.2:5672", "rabbit@two"), False),
    ],
)
def test_a_recording_does_not_return_to_its_source(target: RecordingSource, refused: bool) -> None:
    if not refused:
        refuse_live(LIVE, target)
        return
    with pytest.raises(RecordingError, match="so that is the live one"):
        refuse_live(LIVE, target)


def test_a_recording_without_a_known_broker_counts_as_live() -> None:
    with pytest.raises(RecordingError, match="so that is the live one"):
        refuse_live(RecordingSource("suite", "/"), RecordingSource("suite", "/", "10.0.0.2:5672", "rabbit@two"))
