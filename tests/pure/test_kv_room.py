"""Sessions wait for room in the verifiers' caches before they begin."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.kv_room import (
    GROWTH,
    LATE_TURN,
    LONGEST_PAUSE_MS,
    QUIET_MS,
    RECOUNT_MS,
)
from services.scheduler.core.policies import POLICIES, PolicyOptions
from services.scheduler.core.pool import PendingRound
from services.scheduler.core.verifier_runs import whole_blocks
from services.scheduler.core.waiting import WaitingSessions, kind_of
from shared import cost
from shared.messages import Batch, Finish, Result, Status, Verify

ROOM = 2048
"""Tokens of a verifier's cache."""
PROMPT = 300
HOLDS = ROOM // whole_blocks(PROMPT + GROWTH)
"""Sessions with such prompts that fit."""
MAX_WAIT_MS = 3000.0


def dispatcher(policy: str = "wisp+", verifiers: int = 1, **more: Any) -> Dispatcher:
    d = Dispatcher("s1", SchedulingRules(policy, BatchLimits(4000.0, 8192, MAX_WAIT_MS), **more))
    for number in range(1, verifiers + 1):
        beat(d, f"v{number}", 0.0)
        d.on_cost_model(builders.cost_model(f"v{number}", (10.0, 1.0, 0.01, 0.01, 0.1)), 0.0)
    return d


def beat(d: Dispatcher, name: str, now_ms: float, **more: Any) -> None:
    state = d.fleet.verifiers.get(name)
    held = {} if state is None else state.cached
    room = {"total_tokens": ROOM, "free_tokens": max(0, ROOM - sum(map(whole_blocks, held.values())))}
    d.on_heartbeat(builders.heartbeat(name, held, **room | more), now_ms)


def prompt(name: str, length: int = PROMPT, **more: Any) -> Verify:
    return builders.verify(name, 0, length, [], **more)


def settle(d: Dispatcher, sends: list[tuple[str, Batch]], now_ms: float, finish: Finish | None = None) -> list[str]:
    """Return a result for each job; return the sessions whose rounds are verified."""
    verified = []
    for name, batch in sends:
        for job in batch.jobs:
            fields: dict[str, Any] = {"verifier": name, "batch": batch.batch}
            if job.prefill_to is not None:
                chunk = {"status": Status.PREFILLED, "cached": job.prefill_to}
                d.on_result(builders.result(job.session, job.round, job.base_len, **fields, **chunk), now_ms)
            else:
                verified.append(job.session)
                d.on_result(finished(job.session, job.base_len, finish, **fields), now_ms)
    return verified


def finished(session: str, base_len: int, finish: Finish | None, **fields: Any) -> Result:
    return builders.result(session, 0, base_len, [7], finish=finish, cached=0 if finish else base_len, **fields)


def served(d: Dispatcher, now_ms: float, finish: Finish | None = None) -> list[str]:
    """Serve until nothing more can be sent; return the sessions in the order of their first results."""
    order: list[str] = []
    while sends := d.dispatch(now_ms)[0]:
        order += settle(d, sends, now_ms, finish)
    return order


def test_sessions_beyond_the_cache_begin_when_others_end() -> None:
    d = dispatcher()
    for i in range(HOLDS + 2):
        d.on_verify(prompt(f"s{i}"), float(i))
    begun = served(d, 10.0)
    assert sorted(begun) == [f"s{i}" for i in range(HOLDS)]
    assert sorted(d.fleet.waiting) == [f"s{HOLDS}", f"s{HOLDS + 1}"]
    assert d.load(0.0).without_room == 2
    assert d.fleet.pending_count == 2
    assert d.fleet.pending_round(f"s{HOLDS}") is not None
    d.on_result(finished("s0", PROMPT + 1, Finish.STOP), 20.0)
    assert served(d, 20.0) == [f"s{HOLDS}"], "one has ended, one begins"
    d.on_cancel("s1")
    assert served(d, 30.0) == [f"s{HOLDS + 1}"]


def test_a_round_of_a_session_that_has_begun_never_waits() -> None:
    d = dispatcher()
    for i in range(HOLDS + 1):
        d.on_verify(prompt(f"s{i}"), float(i))
    served(d, 10.0)
    d.on_verify(builders.verify("s0", 1, PROMPT + 1, [5] * 4), 11.0)
    assert served(d, 11.0) == ["s0"]
    d.fleet.verifiers["v1"].cached.pop("s0")  # evicted
    d.on_verify(builders.verify("s0", 2, PROMPT + 2, [5] * 4), 12.0)
    assert served(d, 12.0) == ["s0"]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_other_policies_hold_no_session_back(policy: str) -> None:
    options = PolicyOptions(without=frozenset({"memory"})) if policy == "wisp+" else PolicyOptions()
    d = dispatcher(policy, options=options)
    for i in range(3 * HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    assert not d.fleet.waiting


def test_a_session_that_fits_no_cache_begins_where_there_is_no_other() -> None:
    d = dispatcher()
    d.on_verify(prompt("long", ROOM - 10), 0.0)
    d.on_verify(prompt("short"), 1.0)
    assert list(d.fleet.waiting) == ["short"]
    assert served(d, 2.0, Finish.LENGTH) == ["long", "short"]


def test_a_session_begins_on_the_verifier_that_has_room() -> None:
    d = dispatcher(verifiers=2)
    for i in range(2 * HOLDS + 1):
        d.on_verify(prompt(f"s{i}"), float(i))
    assert [len(state.sessions) for state in d.fleet.verifiers.values()] == [HOLDS, HOLDS]
    assert len(d.fleet.waiting) == 1


def test_sessions_of_a_lost_verifier_begin_before_new_ones() -> None:
    d = dispatcher(verifiers=2)
    for i in range(2 * HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    d.on_verify(prompt("new", slack_ms=500.0), 10.0)
    moved = sorted(d.fleet.verifiers["v2"].sessions)
    for session in moved:
        d.on_verify(builders.verify(session, 1, PROMPT + 1, []), 11.0)
    d.on_returned("v2", 12.0)
    assert sorted(d.fleet.waiting) == sorted(["new", *moved])
    stayed = sorted(d.fleet.verifiers["v1"].sessions)
    for session in stayed:
        d.on_cancel(session)
    assert sorted(served(d, 13.0)) == moved
    d.on_cancel(moved[0])
    assert served(d, 14.0) == ["new"]


def test_a_session_whose_device_is_gone_leaves_its_room() -> None:
    d = dispatcher()
    for i in range(HOLDS + 1):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    beat(d, "v1", QUIET_MS)
    assert served(d, QUIET_MS) == []
    now_ms = QUIET_MS + RECOUNT_MS + 1
    beat(d, "v1", now_ms)
    assert served(d, now_ms) == [f"s{HOLDS}"]


def test_waiting_prompts_are_part_of_the_predicted_backlog() -> None:
    d = dispatcher()
    for i in range(HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    assert d.load(1.0).backlog_ms == 0.0
    d.on_verify(prompt("waits"), 1.0)
    assert d.load(1.0).backlog_ms > 0.0


def pending(name: str, arrived_ms: float, due_ms: float | None, round_: int = 0) -> PendingRound:
    return PendingRound(builders.verify(name, round_), arrived_ms, due_ms)


def waiting_sessions(rounds: Iterable[PendingRound]) -> WaitingSessions:
    waiting = WaitingSessions(MAX_WAIT_MS)
    for one in rounds:
        waiting.add(one)
    return waiting


def test_late_sessions_come_last_except_in_their_turn() -> None:
    waiting = waiting_sessions(
        [
            pending("late-2", 20.0, 90.0),
            pending("late-1", 10.0, 95.0),
            pending("soon", 60.0, 120.0),
            pending("any", 50.0, None),
            pending("later", 30.0, 2000.0),
            pending("begun", 99.0, 50.0, round_=3),
        ]
    )

    def order(late_first: bool) -> list[str]:
        return [p.session_id for p in waiting.order(100.0, late_first=late_first)]

    assert order(False) == ["begun", "soon", "later", "any", "late-1", "late-2"]
    assert order(True) == ["begun", "late-1", "soon", "later", "any", "late-2"]


def sorted_order(waiting: Iterable[PendingRound], now_ms: float, *, late_first: bool) -> list[str]:
    """The order by its definition: all rounds are sorted."""

    def is_late(one: PendingRound) -> bool:
        return one.verify.round == 0 and one.due_ms is not None and one.due_ms < now_ms

    def by_arrival(rounds: Iterable[PendingRound]) -> list[PendingRound]:
        return sorted(rounds, key=lambda one: (one.arrived_ms, one.session_id))

    rounds = list(waiting)
    begun = by_arrival(one for one in rounds if one.verify.round > 0)
    late = by_arrival(filter(is_late, rounds))
    timely = [one for one in rounds if one.verify.round == 0 and not is_late(one)]
    timely.sort(key=lambda one: (one.deadline_ms(MAX_WAIT_MS), one.session_id))
    turn = late[:1] if late_first else []
    return [one.session_id for one in [*begun, *turn, *timely, *late[len(turn) :]]]


@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_waiting_sessions_keep_their_order_as_they_come_and_go(draw: random.Random, changes: int) -> None:
    waiting = WaitingSessions(MAX_WAIT_MS)
    held: dict[str, PendingRound] = {}
    now = 0.0
    for number in range(changes):
        now += draw.choice([0.0, 1.0, 40.0, 4000.0])
        if held and draw.random() < 0.4:
            name = draw.choice(sorted(held))
            assert waiting.remove(name) is held.pop(name)
            assert waiting.remove(name) is None
        else:
            name = f"{draw.randrange(10)}-{number}"
            due = draw.choice([None, now - 5.0, now, now + draw.choice([1.0, 50.0, 5000.0])])
            kind = draw.choice(["f", "g"])
            round_ = draw.choice([0, 0, 0, 2])
            held[name] = PendingRound(builders.verify(name, round_, fingerprint=kind), now, due)
            waiting.add(held[name])
        late_first = draw.random() < 0.5
        assert dict(waiting) == held
        expected = sorted_order(held.values(), now, late_first=late_first)
        assert [one.session_id for one in waiting.order(now, late_first=late_first)] == expected
        # As a decision does: it gives up a kind after two rounds of it.
        tried = Counter[str]()
        without: set[tuple[str, ...]] = set()
        seen = []
        for one in waiting.order(now, late_first=late_first, without=without):
            seen.append(one.session_id)
            tried[one.verify.fingerprint] += 1
            if tried[one.verify.fingerprint] == 2:
                without.add(kind_of(one))
        firsts = {kind: [s for s in expected if held[s].verify.fingerprint == kind][:2] for kind in ("f", "g")}
        assert seen == [s for s in expected if s in firsts["f"] or s in firsts["g"]]


def test_every_fourth_session_that_begins_is_a_late_one() -> None:
    d = dispatcher()
    for i in range(HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    for i in range(8):
        d.on_verify(prompt(f"late-{i}", slack_ms=1.0), 1.0)
    for i in range(8):
        d.on_verify(prompt(f"soon-{i}", slack_ms=1e6), 10.0)
    order: list[str] = []
    running = sorted(d.fleet.verifiers["v1"].sessions)
    while len(order) < 8:
        d.on_cancel(running.pop(0))
        begun = served(d, 20.0)
        order += begun
        running += begun
    late = [i for i, name in enumerate(order) if name.startswith("late")]
    assert len(late) == 8 // LATE_TURN
    assert late[1] - late[0] == LATE_TURN


def test_a_prompt_that_has_waited_longest_lets_none_pass() -> None:
    d = dispatcher()
    for i in range(HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    d.on_verify(prompt("long", 1000), 1.0)
    d.on_verify(prompt("short", 100), 2.0)
    d.on_cancel("s0")
    assert served(d, 3.0) == ["short"], "there is no room for the long one yet"
    d.on_verify(prompt("short-2", 100), MAX_WAIT_MS)
    beat(d, "v1", MAX_WAIT_MS)
    d.on_cancel("s1")
    assert served(d, MAX_WAIT_MS + 10) == [], "the long one has waited long enough"
    assert list(d.fleet.waiting) == ["long", "short-2"]
    d.on_cancel("short")
    for i in range(2, HOLDS):
        d.on_cancel(f"s{i}")
    assert served(d, MAX_WAIT_MS + 20)[:1] == ["long"]


@given(st.integers(0, 2**32), st.lists(st.integers(1, ROOM - 1), min_size=1, max_size=40), st.integers(1, 3))
def test_begun_sessions_fit_and_all_are_served(seed: int, lengths: list[int], verifiers: int) -> None:
    d = dispatcher(verifiers=verifiers)
    draw = random.Random(seed)
    names = [f"v{number}" for number in range(1, verifiers + 1)]
    waiting = {f"s{i}": length for i, length in enumerate(lengths)}
    running: dict[str, int] = {}
    now, seen = 0.0, 0
    while waiting or running or d.fleet.pending_count:
        now += 100.0
        assert now < 1e6, "every session is served in the end"
        if waiting and draw.random() < 0.6:
            name = draw.choice(sorted(waiting))
            d.on_verify(prompt(name, waiting[name], slack_ms=draw.choice([None, 50.0, 5000.0])), now)
            running[name] = waiting.pop(name)
        for name in names:
            beat(d, name, now)
        for session in served(d, now):
            seen += 1
            if draw.random() < 0.7:
                d.on_cancel(session)
                del running[session]
        for state in d.fleet.verifiers.values():
            sessions = state.sessions.values()
            needed = sum(whole_blocks(session.length) for session in sessions)
            forgotten = any(now - session.seen_ms > QUIET_MS for session in sessions)
            assert needed <= ROOM or len(sessions) == 1 or forgotten
        for session in sorted(running):
            if d.fleet.pending_round(session) is None and draw.random() < 0.2:
                d.on_cancel(session)
                del running[session]
    assert seen == len(lengths)


def test_sessions_that_wait_for_another_model_keep_none_back() -> None:
    d = dispatcher()
    beat(d, "other", 0.0, fingerprint="g")
    for i in range(HOLDS + 20):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    d.on_verify(prompt("g1", fingerprint="g"), 1.0)
    assert served(d, 1.0) == ["g1"], "more sessions than are tried at once wait for the other model"
    now_ms = MAX_WAIT_MS + 10
    beat(d, "v1", now_ms)
    beat(d, "other", now_ms, fingerprint="g")
    d.on_verify(prompt("g2", fingerprint="g"), now_ms)
    assert served(d, now_ms) == ["g2"], "they have waited for the longest time"


def test_an_old_session_keeps_others_of_its_verifiers_back() -> None:
    d = dispatcher(verifiers=0)
    beat(d, "v1", 0.0, features=["rows"])
    for i in range(HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    d.on_verify(prompt("long", 1000), 1.0)
    d.on_verify(prompt("short", 100, fingerprint="f+rows"), 2.0)
    beat(d, "v1", MAX_WAIT_MS + 10, features=["rows"])
    d.on_cancel("s0")
    assert served(d, MAX_WAIT_MS + 10) == []
    assert list(d.fleet.waiting) == ["long", "short"]


def test_a_session_that_has_begun_pauses_for_a_limited_time() -> None:
    d = dispatcher(verifiers=2)
    for i in range(2 * HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    moved, stayed = (sorted(d.fleet.verifiers[name].sessions) for name in ("v2", "v1"))
    for session in moved:
        d.on_verify(builders.verify(session, 1, PROMPT + 1, []), 10.0)
    d.on_returned("v2", 10.0)
    d.on_verify(prompt("new"), 10.0)
    for now_ms in (20.0, LONGEST_PAUSE_MS, LONGEST_PAUSE_MS + 20):
        beat(d, "v1", now_ms)
        for session in stayed:
            d.on_verify(builders.verify(session, int(now_ms), PROMPT + 1, []), now_ms)
        went_on = sorted(set(served(d, now_ms)) - {*stayed})
        assert went_on == ([] if now_ms <= LONGEST_PAUSE_MS else moved)
    assert list(d.fleet.waiting) == ["new"]


def test_a_beginning_that_sessions_share_takes_room_once() -> None:
    d = dispatcher()
    for i in range(2 * HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    begun = served(d, 0.0)
    assert len(begun) == HOLDS
    in_use = 256 + HOLDS * whole_blocks(PROMPT + 1 - 256)
    now_ms = RECOUNT_MS + 1
    beat(d, "v1", now_ms, free_tokens=ROOM - in_use)
    begun += served(d, now_ms)
    assert HOLDS < len(begun) < 2 * HOLDS, "those that begin may share nothing"
    taken = in_use + GROWTH * HOLDS + (len(begun) - HOLDS) * whole_blocks(PROMPT + GROWTH)
    assert taken <= ROOM
    now_ms += RECOUNT_MS + 1
    beat(d, "v1", now_ms, free_tokens=0)
    assert served(d, now_ms) == [], "nothing is shared"


def unknown_to(d: Dispatcher, lengths: dict[str, int], now_ms: float) -> None:
    """A heartbeat of v1 with these sessions in its cache."""
    free = ROOM - sum(map(whole_blocks, lengths.values()))
    d.on_heartbeat(builders.heartbeat("v1", lengths, total_tokens=ROOM, free_tokens=free), now_ms)


def test_sessions_of_a_scheduler_that_stopped_keep_their_room() -> None:
    d = dispatcher(verifiers=0)
    lengths = {f"old-{i}": PROMPT for i in range(HOLDS - 1)}
    unknown_to(d, lengths, 0.0)
    for i in range(3):
        d.on_verify(prompt(f"new-{i}"), 1.0)
    assert served(d, 2.0) == ["new-0"]
    for name in lengths:
        d.on_verify(builders.verify(name, 5, PROMPT + 1, []), 3.0)
    assert sorted(served(d, RECOUNT_MS + 4)) == sorted(lengths), "they count once"
    d.on_cancel("old-0")
    d.dispatch(RECOUNT_MS + 5)
    assert list(d.fleet.waiting) == ["new-2"]


def test_a_standby_knows_which_unknown_sessions_are_at_work() -> None:
    d = dispatcher(verifiers=0)
    lengths = {f"old-{i}": PROMPT for i in range(HOLDS)}
    unknown_to(d, lengths, 0.0)
    later = QUIET_MS + 1
    unknown_to(d, lengths | {"old-0": PROMPT + 3, "ended": PROMPT}, later)
    for i in range(HOLDS + 1):
        d.on_verify(prompt(f"new-{i}"), later)
    assert len(served(d, later)) == HOLDS - 1, "only the session that has grown counts"


def test_a_prompt_of_a_session_that_has_ended_does_not_wait() -> None:
    d = dispatcher(verifiers=2)
    for i in range(2 * HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    d.dispatch(0.0)
    ended = next(iter(d.fleet.verifiers["v2"].in_flight[0].jobs))
    d.on_cancel(ended)
    d.on_returned("v2", 1.0)
    assert d.fleet.waiting
    assert ended not in d.fleet.waiting


def test_a_long_session_waits_for_the_cache_that_is_large_enough() -> None:
    d = dispatcher(verifiers=2)
    beat(d, "v2", 0.0, total_tokens=ROOM // 2, free_tokens=ROOM // 2)
    for i in range(HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    for session in list(d.fleet.verifiers["v2"].sessions):
        d.on_cancel(session)
    d.on_verify(prompt("long", ROOM - 10), 1.0)
    assert served(d, 1.0) == [], "the small verifier is idle, and could never hold it"
    for session in list(d.fleet.verifiers["v1"].sessions):
        d.on_cancel(session)
    assert served(d, 2.0) == ["long"]
    assert list(d.fleet.verifiers["v1"].sessions) == ["long"]


def test_a_session_that_no_cache_can_hold_does_not_wait() -> None:
    d = dispatcher()
    for i in range(HOLDS):
        d.on_verify(prompt(f"s{i}"), 0.0)
    served(d, 0.0)
    d.on_verify(prompt("endless", 2 * ROOM), 1.0)
    assert [[job.session for job in batch.jobs] for _, batch in d.dispatch(1.0)[0]] == [["endless"]], "to be refused"


def test_a_session_that_has_waited_halts_runs_that_are_too_slow_for_it() -> None:
    d = dispatcher()
    for i in range(HOLDS):
        d.on_verify(prompt(f"s{i}", run_tokens=32), float(i))
    for name, batch in d.dispatch(10.0)[0]:
        for job in batch.jobs:
            d.on_result(finished(job.session, PROMPT, None, verifier=name, batch=batch.batch, run_left=32), 11.0)
    state = d.fleet.verifiers["v1"]
    alone_ms = cost.predict_ms(state.model, cost.shape_of([(1, PROMPT, 1)]))
    d.on_verify(prompt("promised", tpot_ms=1.1 * alone_ms, slack_ms=1000.0), 12.0)
    assert list(d.fleet.waiting) == ["promised"]
    assert d.halts() == {}
    d.on_cancel("s0")
    d.dispatch(13.0)
    assert not d.fleet.waiting
    assert d.halts() == {"v1": [f"s{i}" for i in range(1, HOLDS)]}
