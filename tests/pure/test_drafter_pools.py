"""Pools of drafters in the scheduler: when one counts as without drafters, and which sessions go to a drafter."""

from __future__ import annotations

from builders import drafter_heartbeat
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.core.drafter_pools import MOST_AT_ONCE, MOST_MOVES, SILENT_MS, DrafterPools, SessionMoves

SESSIONS = [f"s{i}" for i in range(20)]


def test_a_pool_whose_drafters_are_silent_is_without_drafters() -> None:
    pools = DrafterPools(["a", "b"], 0.0)
    assert pools.without_drafters(SILENT_MS - 1) == [], "their heartbeats may still come"
    assert pools.without_drafters(SILENT_MS) == ["a", "b"]
    pools.on_heartbeat(drafter_heartbeat("d1", "a"), SILENT_MS)
    assert pools.without_drafters(SILENT_MS) == ["b"]
    assert pools.without_drafters(2 * SILENT_MS) == ["b"]
    assert pools.without_drafters(2 * SILENT_MS + 1) == ["a", "b"]


def test_drafters_that_are_gone_are_forgotten_though_nobody_asks() -> None:
    pools = DrafterPools(["a"], 0.0)
    for number in range(100):
        pools.on_heartbeat(drafter_heartbeat(f"d{number}", f"p{number}"), number * SILENT_MS)
    assert pools.remembered == 2


def test_a_stand_in_is_no_drafter_and_other_pools_are_not_listed() -> None:
    pools = DrafterPools(["a"], -SILENT_MS)
    pools.on_heartbeat(drafter_heartbeat("s1.a", "a", drafts=False), 0.0)
    pools.on_heartbeat(drafter_heartbeat("d1", "z"), 0.0)
    assert pools.without_drafters(0.0) == ["a"]
    assert pools.without_drafters(2 * SILENT_MS) == ["a"]


def test_a_pause_of_the_scheduler_makes_no_drafter_silent() -> None:
    pools = DrafterPools(["a"], -SILENT_MS)
    pools.on_heartbeat(drafter_heartbeat("d1", "a"), 0.0)
    pools.on_pause(60_000.0)
    assert pools.without_drafters(60_000.0 + SILENT_MS) == []
    assert pools.without_drafters(60_001.0 + SILENT_MS) == ["a"]


def test_a_drafter_gets_as_many_sessions_as_it_has_room_for() -> None:
    moves = SessionMoves()
    assert moves.choose(drafter_heartbeat(sessions=62, max_sessions=64), SESSIONS) == ["s0", "s1"]
    assert moves.choose(drafter_heartbeat(sessions=64, max_sessions=64), SESSIONS) == []
    assert moves.choose(drafter_heartbeat(sessions=70, max_sessions=64), SESSIONS) == []
    assert moves.choose(drafter_heartbeat(), SESSIONS) == SESSIONS[:MOST_AT_ONCE]
    assert moves.choose(drafter_heartbeat(drafts=False), SESSIONS) == [], "another stand-in is no better"


def test_a_session_that_comes_back_again_and_again_stays() -> None:
    moves = SessionMoves()
    for _ in range(MOST_MOVES):
        assert moves.choose(drafter_heartbeat(), ["s"]) == ["s"]
    assert moves.choose(drafter_heartbeat(), ["s", "other"]) == ["other"]


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), max_size=30))
def test_no_choice_exceeds_a_drafters_room_or_a_sessions_moves(beats: list[tuple[int, int]]) -> None:
    moves, moved = SessionMoves(), dict.fromkeys(SESSIONS, 0)
    for sessions, most in beats:
        chosen = moves.choose(drafter_heartbeat(sessions=sessions, max_sessions=most), SESSIONS)
        assert len(chosen) == len(set(chosen)) <= max(0, most - sessions)
        for name in chosen:
            moved[name] += 1
    assert max(moved.values()) <= MOST_MOVES
