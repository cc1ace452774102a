"""Recorded requests asked again: what is asked, where it may not be asked, and what became of it."""

from __future__ import annotations

import pytest
import recorded
from recorded import A

from services.tools.replayer.core.injection import Again, answers, requests_of
from services.tools.replayer.core.performance import Served
from services.tools.replayer.core.recording import RecordingError, Source
from services.tools.replayer.inject import in_vhost, refuse_live
from shared.messages import Cancel, Failure, Finish, Status

LIVE = Source("suite", "/", "10.0.0.1:5672", "rabbit@one")


def again() -> Again:
    [asked] = requests_of(recorded.recording(recorded.sent()))
    return Again(asked, "inject-1-a", Served("inject-1-a", asked.generate.slo, "default", 0.0))


def test_requests_come_with_what_they_got() -> None:
    cancel = (152.0, "cancel", Cancel(session=A, reason="client left"))
    [asked] = requests_of(recorded.recording([*recorded.sent(), cancel]))
    assert (asked.key, asked.generate) == ("generate.pool", recorded.generate())
    assert (asked.at_ms, asked.cancel_ms) == (recorded.START_MS + 5, recorded.START_MS + 152)
    assert asked.output == [11, 12, 99]
    assert (asked.ttft_ms, asked.tpot_ms) == (60, 45)


def test_the_same_text_in_other_rounds_is_the_same() -> None:
    one = again()
    one.take(recorded.result(A, 0, 3, "x-1", [11, 12]), 80.0)
    one.take(recorded.result(A, 0, 3, "x-1", [11, 12]), 85.0)  # a copy
    one.take(recorded.result(A, 1, 5, "x-2", [99], finish=Finish.LENGTH), 120.0)
    told = answers([one], late_ms=2.0)
    assert (told.compared, told.differing, told.ended) == (3, [], {"length": 1})
    assert told.ttft_p50_ms == (60, 80)
    assert told.tpot_p50_ms == (45, 20)


def test_another_token_is_named_by_its_place() -> None:
    one = again()
    one.take(recorded.result(A, 0, 3, "x-1", [11, 13]), 80.0)
    told = answers([one], late_ms=0.0)
    assert told.differing == [(A, 4)]
    assert told.ended == {"unfinished": 1}


def test_a_text_that_ended_earlier_is_compared_as_far_as_it_goes() -> None:
    one = again()
    one.take(recorded.result(A, 0, 3, "x-1", [11]), 80.0)
    failure = Failure(code="other_model", message="no")
    one.take(recorded.result(A, 1, 4, "x-2", [], status=Status.FAILED, error=failure), 90.0)
    told = answers([one], late_ms=0.0)
    assert (told.compared, told.differing, told.ended) == (1, [], {"other_model": 1})
    assert told.ttft_p50_ms == (None, None), "only of texts that ended by themselves"


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
        (Source("other", "/", "10.0.0.1:5672", "rabbit@renamed"), True),  # the namespace does not matter
        (Source("suite", "/", "proxy:5672", "rabbit@one"), True),  # the same broker under another address
        (Source("suite", "debug", "10.0.0.1:5672", "rabbit@one"), False),
        (Source("suite", "/", "10.0.0.2:5672", "rabbit@two"), False),
    ],
)
def test_a_recording_does_not_go_back_to_where_it_comes_from(target: Source, refused: bool) -> None:
    if not refused:
        refuse_live(LIVE, target)
        return
    with pytest.raises(RecordingError, match="so that is the live one"):
        refuse_live(LIVE, target)


def test_a_recording_of_unknown_origin_does_not_go_into_a_virtual_host_of_its_name() -> None:
    with pytest.raises(RecordingError, match="so that is the live one"):
        refuse_live(Source("suite", "/"), Source("suite", "/", "10.0.0.2:5672", "rabbit@two"))
