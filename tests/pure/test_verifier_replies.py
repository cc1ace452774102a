"""Replies to a batch: what is committed, what each job is answered, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import builders
import pytest

from services.verifier.core import replies
from services.verifier.core.acceptance import Verdict
from services.verifier.core.replies import BatchReplies
from services.verifier.core.runs import RunTable
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared.errors import TooLong
from shared.messages import HiddenFormat, Job, Sampling, Status
from shared.models.hidden_states import Part
from shared.state.commits import CommitOutcome, Committed

VERDICT = Verdict(1, [8, 9], None)


def job(session: str = "s") -> Job:
    return builders.job(session, 4, 3, [8, 1], queue_ms=2.0, sources=["lookup", "hidden"])


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
