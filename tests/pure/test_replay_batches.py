"""Recorded batches: each job with the tokens committed before it, and the jobs that cannot be computed again."""

from __future__ import annotations

from collections.abc import Iterable

import builders
import recorded
from hypothesis import given
from hypothesis import strategies as st
from recorded import A, B, C, Sent

from services.tools.replayer.core.batches import (
    BatchJob,
    ComputedJob,
    RecordedBatches,
    RecordedText,
    packed,
    recorded_batches,
)
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


def lane(name: str, rounds: int, prompt: int = 10) -> list[BatchJob]:
    """A session's jobs: its prompt, then a token a round."""
    text = RecordedText(builders.generate(name), [])
    jobs = []
    for i in range(rounds):
        job = recorded.job(name, i, prompt + i, [])
        result = recorded.result(name, i, prompt + i, f"{name}-{i}", [7], new_tokens=1 if i else prompt)
        jobs.append((f"{name}-{i}", ComputedJob(job, result, text, alone=True)))
    return jobs


def names(batches: Iterable[list[BatchJob]]) -> list[list[str]]:
    return [[batch_id for batch_id, _ in batch] for batch in batches]


def test_jobs_of_several_sessions_are_computed_at_once() -> None:
    lanes = [lane("a", 3), lane("b", 1), lane("c", 2)]
    assert names(packed(lanes, at_once=2, cache_tokens=10_000, pass_tokens=1000)) == [
        ["a-0", "b-0"],
        ["a-1", "c-0"],
        ["a-2", "c-1"],
    ]


def test_batches_of_several_sessions_keep_to_their_tokens() -> None:
    lanes = [lane("a", 2, prompt=60), lane("b", 2, prompt=60), lane("c", 1, prompt=500)]
    found = names(packed(lanes, at_once=9, cache_tokens=10_000, pass_tokens=100))
    assert found == [["a-0"], ["b-0"], ["c-0"], ["a-1", "b-1"]]


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 300)), max_size=12),
    st.integers(1, 5),
    st.integers(1, 2000),
    st.integers(1, 500),
)
def test_every_job_is_computed_once_and_in_its_sessions_order(
    shapes: list[tuple[int, int]], at_once: int, cache_tokens: int, pass_tokens: int
) -> None:
    lanes = [lane(f"s{i}", rounds, prompt) for i, (rounds, prompt) in enumerate(shapes)]
    batches = list(packed(lanes, at_once, cache_tokens, pass_tokens))
    for one in lanes:
        session_id = one[0][1].job.session
        assert [job for batch in batches for job in batch if job[1].job.session == session_id] == one
    for batch in batches:
        sessions = [job.job.session for _, job in batch]
        assert len(sessions) == len(set(sessions)) <= at_once
        longest = [prompt + rounds - 1 for i, (rounds, prompt) in enumerate(shapes) if f"s{i}" in sessions]
        assert len(batch) == 1 or sum(longest) <= cache_tokens
        assert len(batch) == 1 or sum(job.result.new_tokens for _, job in batch) <= pass_tokens
