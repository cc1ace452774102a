"""Recorded batches: each job with the tokens committed before it, and the jobs that cannot be computed again."""

from __future__ import annotations

import recorded
from recorded import A, B, C, Sent

from services.tools.replayer.core.batches import RecordedBatches, recorded_batches
from shared.messages import Generate, Result, Status


def batches_of(sent: list[Sent]) -> RecordedBatches:
    return recorded_batches(recorded.recording(sent))


def test_every_job_comes_with_the_text_before_it() -> None:
    found = batches_of([*recorded.sent()[:3], (6.0, "generate.pool", recorded.generate(C)), *recorded.sent()[3:]])
    batches = dict(found.computed())
    assert [(one.job.session, one.tokens) for one in batches["s1-1"]] == [(A, [5, 6, 7])]
    assert [(one.job.session, one.tokens) for one in batches["s1-3"]] == [(A, [5, 6, 7, 11]), (C, [5, 6, 7])]
    assert all(one.alone for jobs in batches.values() for one in jobs)
    assert found.texts[A].tokens == [5, 6, 7, 11, 12, 99]
    assert found.texts[A].room == 6
    assert (found.fingerprints, found.cache_tokens, found.contradiction) == ({"f"}, 4096, None)
    assert found.left_out == {"the beginning of its session is not in the recording": 1}  # B's


def test_batches_can_be_limited_to_a_session() -> None:
    assert [name for name, _ in batches_of(recorded.sent()).computed({A})] == ["s1-1", "s1-3"]
    assert [name for name, _ in batches_of(recorded.sent()).computed({B})] == [], "its request is not recorded"


def test_jobs_that_cannot_be_computed_again_are_counted_by_reason() -> None:
    def is_result(message: object, round_: int) -> bool:
        return isinstance(message, Result) and message.session == A and message.round == round_

    def left_out(sent: list[Sent]) -> dict[str, int]:
        found = batches_of(sent)
        list(found.computed({A}))
        return {reason: count for reason, count in found.left_out.items() if "beginning" not in reason}

    sent = recorded.sent()
    assert left_out([one for one in sent if not is_result(one[2], 1)]) == {"no result was recorded": 1}
    assert left_out([one for one in sent if not is_result(one[2], 0)]) == {
        "no result was recorded": 1,
        "a part of its text is not in the recording": 1,
    }
    settled = recorded.result(A, 1, 4, "s1-3", [12, 99], new_tokens=0)
    changed = [(at, key, settled if is_result(message, 1) else message) for at, key, message in sent]
    assert left_out(changed) == {"nothing was computed for it": 1}
    assert not list(batches_of([one for one in sent if not isinstance(one[2], Generate)]).computed())


def test_results_that_contradict_each_other_are_reported() -> None:
    again = recorded.result(A, 1, 4, "s1-9", [12, 98, 3], status=Status.CONFLICT)
    found = batches_of([*recorded.sent(), (160.0, "result.d1", again)])
    assert found.contradiction is not None
    assert (found.contradiction.session, found.contradiction.position) == (A, 5)
    assert found.contradiction.said == "its result has token 98 where an earlier one has 99"
    assert [one.alone for name, jobs in found.computed({A}) for one in jobs if one.job.session == A] == [True, False]
