"""Replies to a batch: what is committed, what each job is answered, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import builders
import pytest

from services.verifier import metrics
from services.verifier.core import replies
from services.verifier.core.acceptance import Verdict
from services.verifier.core.replies import BatchReplies, JobReply
from services.verifier.core.runs import RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared.errors import TooLong
from shared.messages import HiddenFormat, Job, Sampling, Status
from shared.models.hidden_states import Part
from shared.state.commits import CommitOutcome, Committed

VERDICT = Verdict(1, [8, 9], None)


def job(session: str = "s", **fields: Any) -> Job:
    return builders.job(session, 4, 3, [8, 1], queue_ms=2.0, sources=["lookup", "hidden"], **fields)


def task(session: str = "s") -> VerifyTask:
    return VerifyTask(session, [5, 6, 7], [8, 1], Sampling(), frozenset(), room=10)


def part(rows: int) -> Part:
    return Part(0, rows, 1, HiddenFormat.BFLOAT16, b"\0\0" * rows, b"")


def outcome(verdict: Verdict | None = VERDICT, hidden: Sequence[Part] = ()) -> VerifyOutcome:
    return VerifyOutcome(verdict, 2, 4, 5, hidden=hidden, logits_digest="0" * 16)


def answer(kind: CommitOutcome = CommitOutcome.COMMITTED, tokens: Sequence[int] = (8, 9)) -> Committed:
    return Committed(kind, 3 + len(tokens), 3, 1, None, list(tokens), ["other", "wisp-1"])


def batch() -> BatchReplies:
    return BatchReplies("v1", "b1", 30.0, "wisp-1", RunTable(digests=False), predicted_ms=28.0)


def test_a_verdict_is_committed_and_becomes_the_result() -> None:
    made = batch()
    made.verified(job(), task(), outcome())
    ((commit, (reply,)),) = [(one.commit, made.settle([answer()])) for one in made.open]
    assert (commit.base_len, commit.accepted, commit.tokens, commit.cached) == (3, 1, [8, 9], 4)
    result = reply.result
    assert (result.status, result.tokens, result.accepted, result.trimmed_to) == (Status.COMMITTED, [8, 9], 1, 2)
    assert (result.verifier, result.batch, result.round, result.drafted) == ("v1", "b1", 4, 2)
    assert (result.queue_ms, result.verify_ms, result.logits_digest) == (2.0, 30.0, "0" * 16)
    assert (result.arithmetic, result.committed_in) == ("wisp-1", ["other", "wisp-1"])
    assert (result.predicted_ms, result.sources) == (28.0, ["lookup", "hidden"])
    assert (reply.for_drafter, reply.for_gateway) == (True, True)


def test_a_stale_job_commits_nothing_and_gets_the_committed_tokens() -> None:
    made = batch()
    made.ask(job())
    (one,) = made.open
    assert (one.commit.tokens, one.commit.finish, one.commit.cached) == ((), None, 0)
    (reply,) = made.settle([answer(CommitOutcome.CONFLICT, [4])])
    assert (reply.result.status, reply.result.tokens, reply.result.trimmed_to) == (Status.CONFLICT, [4], 0)
    assert reply.result.committed_in == ["other", "wisp-1"]


@pytest.mark.parametrize(
    ("kind", "failure"), [(CommitOutcome.GONE, replies.GONE), (CommitOutcome.CANCELLED, replies.CANCELLED)]
)
def test_a_session_that_takes_no_more_tokens_fails(kind: CommitOutcome, failure: object) -> None:
    made = batch()
    made.verified(job(), task(), outcome())
    (reply,) = made.settle([answer(kind, [])])
    assert (reply.result.status, reply.result.error) == (Status.FAILED, failure)
    assert answer(kind).ended


def test_a_chunk_of_prefill_is_not_answered_to_the_drafter() -> None:
    made = batch()
    made.verified(job(), task(), outcome(verdict=None))
    assert made.open == []
    (reply,) = made.settle([])
    assert (reply.result.status, reply.result.cached) == (Status.PREFILLED, 4)
    assert (reply.for_drafter, reply.for_gateway) == (False, True)


def test_a_job_that_the_engine_refuses_fails_with_the_reason() -> None:
    made = batch()
    made.verified(job("long"), task("long"), VerifyOutcome(None, 0, 0, 0, TooLong("too long")))
    made.verified(job("bad"), task("bad"), VerifyOutcome(None, 0, 0, 0, ValueError("bad step")))
    long, bad = [reply.result.error for reply in made.settle([])]
    assert long is not None
    assert (long.code, long.message) == ("context_length_exceeded", "too long")
    assert bad is not None
    assert (bad.code, bad.message) == ("verification_failed", "ValueError: bad step")


def test_a_forged_job_is_answered_to_the_scheduler_only() -> None:
    made = batch()
    made.fail(job("forged"), replies.FORBIDDEN)
    made.fail(job("other"), replies.wrong_model(job("other"), "served"))
    forged, other = made.settle([])
    assert (forged.for_drafter, forged.for_gateway) == (False, False)
    assert (other.for_drafter, other.for_gateway) == (True, True)


def test_hidden_states_come_last_and_only_for_committed_choices() -> None:
    made = batch()
    for session in ("prompt", "short", "raced", "plain"):
        rows = {"prompt": 50, "short": 2, "raced": 3}.get(session)
        made.verified(job(session), task(session), outcome(hidden=[part(rows)] if rows else []))
    settled = made.settle([answer(), answer(), answer(tokens=[8, 7]), answer()])
    assert [(reply.job.session, reply.hidden_rows) for reply in settled] == [
        ("raced", 0),
        ("plain", 0),
        ("short", 2),
        ("prompt", 50),
    ]
    (states,) = settled[-1].hidden
    assert (states.session, states.round, states.start, states.count) == ("prompt", 4, 0, 50)


def settled(*jobs: Job, hidden: Sequence[str] = ()) -> list[JobReply]:
    made = batch()
    for one in jobs:
        made.verified(one, task(one.session), outcome(hidden=[part(2)] if one.session in hidden else []))
    return made.settle([answer() for _ in jobs])


def grouped(*jobs: Job, hidden: Sequence[str] = ()) -> list[list[str]]:
    return [[reply.job.session for reply in group] for group in replies.groups(settled(*jobs, hidden=hidden))]


def test_results_with_the_same_receivers_go_together() -> None:
    assert grouped(
        job("a", grouped=True),
        job("b", grouped=True, drafter="d2"),
        job("c", grouped=True, gateway="g2"),
        job("d", grouped=True),
        job("e", grouped=True, drafter="d2"),
    ) == [["a", "d"], ["b", "e"], ["c"]]


def test_a_receiver_that_reads_no_groups_gets_each_result_alone() -> None:
    assert grouped(job("a"), job("b", grouped=True), job("c"), job("d", grouped=True)) == [["a"], ["b", "d"], ["c"]]


def test_a_result_with_hidden_states_goes_alone_behind_the_others() -> None:
    jobs = [job(name, grouped=True) for name in "abc"]
    assert grouped(*jobs, hidden=["a"]) == [["b", "c"], ["a"]]


def test_a_forged_job_is_not_grouped_with_those_of_its_gateway() -> None:
    made = batch()
    made.verified(job("a", grouped=True), task("a"), outcome())
    made.fail(job("forged", grouped=True), replies.FORBIDDEN)
    assert [[reply.job.session for reply in group] for group in replies.groups(made.settle([answer()]))] == [
        ["forged"],
        ["a"],
    ]


def test_committed_tokens_are_counted_once_by_origin() -> None:
    committed = {"new_tokens": 5, "trimmed_to": 3}
    results = [
        builders.result(tokens=[1, 2, 3], accepted=2, **committed),
        builders.result(tokens=[1, 2, 3, 4], run=True, copied=[0, 2], **committed),
        builders.result(tokens=[1, 2, 3], accepted=2),  # a repeated answer: nothing was computed for it
        builders.result(tokens=[9], status=Status.CONFLICT, new_tokens=1),
    ]
    origins = ("draft", "bonus", "copy", "run")
    before = [metrics.TOKENS.labels(origin)._value.get() for origin in origins]
    for result in results:
        metrics.count_tokens(result)
    after = [metrics.TOKENS.labels(origin)._value.get() for origin in origins]
    assert [int(b - a) for a, b in zip(before, after, strict=True)] == [2, 1, 2, 2]


def test_a_group_is_bounded() -> None:
    jobs = [job(f"s{i}", grouped=True) for i in range(2 * replies.MOST_GROUPED + 1)]
    assert [len(group) for group in grouped(*jobs)] == [replies.MOST_GROUPED, replies.MOST_GROUPED, 1]
