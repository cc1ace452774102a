"""A session's state in the drafter, the round timer, and prompt lookup."""

from __future__ import annotations

import itertools
from typing import Any

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.drafter.control import Controller, DraftRound
from services.drafter.core.session import (
    LONGEST_BACKOFF_MS,
    LONGEST_MS,
    UNKNOWN_MS,
    DraftSession,
    RoundTimer,
    bonus_matches,
)
from services.drafter.sources import Draft, DraftRequest, LookupDrafts, NoDrafts
from shared.messages import Failure, Finish, Result, Sampling, Slo, Status

PROMPT = [1, 2, 3]


def session(slo: Slo | None = None, max_tokens: int = 10) -> DraftSession:
    return DraftSession(builders.generate(prompt=PROMPT, stop_ids=[], max_tokens=max_tokens, slo=slo), list(PROMPT))


def result(round_: int, base: int, tokens: list[int], status: Status = Status.COMMITTED, **more: Any) -> Result:
    return builders.result("s", round_, base, tokens, status=status, **more)


def test_a_result_moves_the_session_to_the_next_round() -> None:
    s = session()
    assert s.apply(result(0, 3, [7, 8]))
    assert (s.tokens, s.round, s.output_tokens, s.done) == ([1, 2, 3, 7, 8], 1, 2, False)


def test_a_repeated_result_changes_nothing() -> None:
    s = session()
    s.apply(result(0, 3, [7, 8]))
    assert not s.apply(result(0, 3, [7, 8]))
    assert s.tokens == [1, 2, 3, 7, 8]


def test_a_conflict_replaces_the_tokens_from_its_base_on() -> None:
    s = session()
    s.tokens += [9, 9]
    assert s.apply(result(0, 4, [6, 7], Status.CONFLICT))
    assert s.tokens == [1, 2, 3, 9, 6, 7]


def test_a_chunk_of_prefill_does_not_settle_a_round() -> None:
    s = session()
    assert not s.apply(result(0, 3, [], Status.PREFILLED))
    assert s.round == 0


def report(round_: int, base: int, tokens: list[int], left: int, **more: Any) -> Result:
    return result(round_, base, tokens, run=True, run_left=left, **more)


def test_tokens_of_a_run_follow_without_rounds() -> None:
    s = session()
    s.apply(result(0, 3, [7], run_left=4))
    assert (s.run_left, s.round) == (4, 1)
    assert s.apply(report(1, 4, [8, 9], 2))
    assert s.apply(report(2, 6, [10, 11], 0))
    assert (s.tokens, s.round, s.run_left) == ([1, 2, 3, 7, 8, 9, 10, 11], 3, 0)


def test_a_report_that_is_known_or_follows_a_lost_one_changes_nothing() -> None:
    s = session()
    s.apply(result(0, 3, [7], run_left=9))
    s.apply(report(1, 4, [8], 8))
    assert not s.apply(report(1, 4, [8], 8))
    assert not s.apply(report(3, 6, [10], 6)), "the token at 5 is unknown"
    assert s.tokens == [1, 2, 3, 7, 8]
    assert s.apply(result(2, 5, [9, 10, 11], Status.CONFLICT, run_left=5)), "the next round's answer has all of them"
    assert (s.tokens, s.run_left) == ([1, 2, 3, 7, 8, 9, 10, 11], 5)
    assert s.apply(report(6, 8, [12], 4)), "the run counts its own rounds"
    assert s.round == 7


def test_a_run_may_end_the_session() -> None:
    s = session()
    s.apply(result(0, 3, [7], run_left=9))
    s.apply(report(1, 4, [2], 0, finish=Finish.STOP))
    assert s.done


def test_a_finish_or_a_failure_ends_the_session() -> None:
    ended, failed = session(), session()
    assert ended.apply(result(0, 3, [7], finish=Finish.STOP))
    assert ended.done
    assert failed.apply(result(0, 3, [], Status.FAILED, error=Failure(code="session_gone", message="gone")))
    assert failed.done
    assert failed.failure is not None
    assert not failed.apply(result(0, 3, [7]))


def test_rounds_carry_the_arithmetic_of_the_committed_tokens() -> None:
    s = session()
    assert s.verify([], [], "d", 0.0, 0.0).committed_in == []
    s.apply(result(0, 3, [7], committed_in=["wisp-1"]))
    s.apply(result(1, 4, [8]))  # by a verifier of an earlier version
    assert s.verify([], [], "d", 0.0, 0.0).committed_in == ["wisp-1"]


@pytest.mark.parametrize(("trace", "sources"), [(True, ["lookup", "hidden"]), (False, [])])
def test_rounds_name_the_sources_of_their_drafts_for_a_trace(trace: bool, sources: list[str]) -> None:
    s = DraftSession(builders.generate(trace=trace), [5, 6, 7])
    assert s.verify([1, 2], [0.5, 0.5], "d", 0.0, 0.0, sources=["lookup", "hidden"]).sources == sources


def test_drafts_leave_room_for_the_bonus_token() -> None:
    s = session(max_tokens=4)
    assert s.draft_room(8) == 3
    assert s.draft_room(8, assumed=2) == 1, "room after two more tokens"
    s.apply(result(0, 3, [7, 8, 9]))
    assert s.draft_room(8) == 0


def test_slack_is_the_time_left_until_the_next_token_is_due() -> None:
    s = session(Slo(ttft_ms=1000.0, tpot_ms=100.0))
    s.apply(result(0, 3, [7, 8]))
    verify = s.verify([1], [0.5], "d", elapsed_ms=1150.0, draft_ms=3.0)
    assert verify.slack_ms == pytest.approx(50.0)
    assert session().verify([], [], "d", elapsed_ms=5.0, draft_ms=0.0).slack_ms is None


@pytest.mark.parametrize(
    ("draft", "tokens", "trimmed_to", "accepted", "matches"),
    [
        (Draft([7], dropped=8), [7, 8], 1, 1, True),
        (Draft([7], dropped=8), [7, 9], 1, 1, False),
        (Draft([7], dropped=8), [6], 1, 0, None),
        (Draft([7], dropped=8), [7], 1, 1, None),  # the text ended with the accepted token
        (Draft([7]), [7, 8], 1, 1, None),
        (Draft([7, 8]), [7, 8], 1, 1, True),  # trimmed to one token
        (Draft(dropped=7), [7], 0, 0, True),
    ],
)
def test_the_bonus_token_shows_if_an_unverified_token_was_right(
    draft: Draft, tokens: list[int], trimmed_to: int, accepted: int, matches: bool | None
) -> None:
    assert bonus_matches(draft, result(0, 3, tokens, trimmed_to=trimmed_to, accepted=accepted)) is matches


def test_the_timer_follows_the_measured_round_time_and_backs_off() -> None:
    timer = RoundTimer(shortest_ms=100.0)
    assert timer.timeout_ms(0) == UNKNOWN_MS
    for _ in range(100):
        timer.learn(500.0)
    assert 500.0 <= timer.timeout_ms(0) < 520.0
    assert timer.timeout_ms(1) == 2 * timer.timeout_ms(0)
    assert timer.timeout_ms(30) == LONGEST_BACKOFF_MS <= 5000.0, "soon after an outage a round is sent again"
    for i in range(100):
        timer.learn(500.0 + 300.0 * (i % 2))
    assert timer.timeout_ms(0) > 1000.0, "a varying round time needs a longer timeout"


def test_a_round_that_usually_takes_long_is_not_sent_again_before() -> None:
    timer = RoundTimer(shortest_ms=100.0)
    for _ in range(100):
        timer.learn(20_000.0)
    assert 20_000.0 <= timer.timeout_ms(0) == timer.timeout_ms(30) <= LONGEST_MS


def test_the_timeout_is_never_shorter_than_its_setting() -> None:
    timer = RoundTimer(shortest_ms=100.0)
    for _ in range(50):
        timer.learn(1.0)
    assert timer.timeout_ms(0) == 100.0


def round_of(length: int) -> DraftRound:
    return Controller("fixed", 100).session("lookup").begin(length, temperature=0.0)


def request(tokens: list[int], round_: DraftRound) -> DraftRequest:
    return DraftRequest("s", tokens, Sampling(), round_, ("lookup",))


def propose(lookup: LookupDrafts, tokens: list[int], length: int) -> list[int]:
    return lookup.propose([request(tokens, round_of(length))])[0].tokens


def test_lookup_copies_the_tokens_after_the_longest_match() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 3, 8, 8, 1, 2, 3]
    assert propose(LookupDrafts(), tokens, 3) == [4, 5, 9]


def test_lookup_prefers_the_latest_occurrence() -> None:
    assert propose(LookupDrafts(), [7, 1, 7, 2, 7, 3, 7], 1) == [3]


def test_lookup_continues_a_repeating_pattern() -> None:
    assert propose(LookupDrafts(), [5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]


def test_lookup_without_a_match_or_room_drafts_nothing() -> None:
    assert propose(LookupDrafts(), [1, 2, 3, 4], 4) == []
    assert propose(LookupDrafts(), [5, 5, 5], 0) == []


@pytest.mark.parametrize(("tokens", "support"), [([1, 2, 3, 9, 1, 2, 3], 3), ([7, 3, 9, 8, 3], 1)])
def test_lookup_reports_the_length_of_the_match(tokens: list[int], support: int) -> None:
    round_ = round_of(2)
    LookupDrafts().propose([request(tokens, round_)])
    assert [token.support for token in round_.kept_tokens] == [support, support + 1], "the first copy matches too"


def test_lookup_copies_no_further_than_the_round_wants() -> None:
    control = Controller("marginal", 8).session("lookup")
    control.times.price_ms = 1e6
    round_ = control.ahead(8, temperature=0.0)
    assert LookupDrafts().propose([request([5, 6, 5, 6], round_)])[0].tokens == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60))
def test_an_index_grown_step_by_step_equals_one_built_at_once(tokens: list[int], cut: int) -> None:
    grown = LookupDrafts()
    for end in range(min(cut, len(tokens)), len(tokens) + 1):
        last = propose(grown, tokens[:end], 4)
    assert last == propose(LookupDrafts(), tokens, 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_lookup_proposes_only_continuations_seen_before(tokens: list[int]) -> None:
    (first, *_rest), support = propose(LookupDrafts(), tokens, 2) or [None], 1
    if first is not None:
        pairs = set(itertools.pairwise(tokens))
        assert (tokens[-support], first) in pairs


def test_the_source_none_drafts_nothing() -> None:
    assert NoDrafts().propose([request([1, 1], round_of(4))])[0].tokens == []
