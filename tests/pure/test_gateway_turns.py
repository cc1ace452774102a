"""The order of turns: sessions that wait in a working queue do not count as idle, sessions passed over do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.turns import BACKLOG_FACTOR, OVERTAKING_S, RESOLUTION_S, TurnOrder, Wait


def new(started_s: float, pool: str = "pool") -> Wait:
    return Wait(pool, started_s, started_s)


def test_a_session_alone_is_idle_from_its_start_or_last_turn() -> None:
    order, wait = TurnOrder(), new(10)
    assert order.idle_s(wait, 70) == 60
    order.record(wait, 75)
    assert (wait.had_turn, wait.since_s) == (True, 75)
    assert order.idle_s(wait, 80) == 5


def test_a_burst_served_in_order_of_arrival_is_never_idle() -> None:
    order, waits = TurnOrder(), [new(number / 100) for number in range(50)]
    for number, wait in enumerate(waits):
        now_s = 20.0 * (number + 1)
        assert all(order.idle_s(later, now_s) <= 20 for later in waits[number:])
        order.record(wait, now_s)


def test_running_sessions_take_turns_before_one_that_has_no_drafter_yet() -> None:
    order, running, waiting = TurnOrder(), new(0), new(10)
    for now_s in range(20, 320, 2):
        order.record(running, now_s)
        assert order.idle_s(waiting, now_s) == 0
        assert order.idle_s(new(10, "phones"), now_s) >= now_s - 20, "another pool has drafters of its own"
    later = new(300)
    for now_s in range(320, 400, 2):
        order.record(later, now_s)
    assert order.idle_s(waiting, 400) == 400 - 318, "only later requests are served, so nobody works on it"


def test_a_wait_for_room_in_the_caches_is_no_stall_in_a_pool_of_ones_own() -> None:
    order, running, waiting = TurnOrder(), new(0), new(10, "device.own")
    for now_s in range(20, 320, 2):
        order.record(running, now_s)
    assert order.idle_s(waiting, 318) > 290, "a pool of its own has a drafter with room"
    order.record_room_awaited(318)
    assert order.idle_s(waiting, 318) == 0
    order.record_room_awaited(400)
    assert order.idle_s(waiting, 400) == 82, "nobody with room goes on"
    later = new(300)
    for now_s in range(320, 400, 2):
        order.record(later, now_s)
    assert order.idle_s(waiting, 400) == 82, "who came later may not pass for ever"


def test_a_session_that_has_got_room_has_time_for_its_first_turn() -> None:
    order, running, waiting = TurnOrder(), new(0), new(10, "device.own")
    for now_s in range(20, 320, 2):
        order.record(running, now_s)
        order.record_room_awaited(now_s)
    assert order.idle_s(waiting, 330) == 12, "nobody waits for room any more"
    for now_s in range(320, 400, 2):
        order.record(running, now_s)
    assert order.idle_s(waiting, 400) == 82, "it has room, and others' turns are no reason to wait"


def test_a_session_that_is_passed_over_is_idle() -> None:
    order, stuck, others = TurnOrder(), new(0), [new(0) for _ in range(5)]
    order.record(stuck, 1)
    for now_s in range(2, 62):
        order.record(others[now_s % 5], now_s)
    assert order.idle_s(stuck, 62) >= 62 - 1 - 2 * OVERTAKING_S


def test_the_backlog_of_other_gateways_and_pauses_are_no_idle_time() -> None:
    order, wait = TurnOrder(), new(0)
    wait.backlog_s = 30
    assert order.idle_s(wait, 100) == 100 - BACKLOG_FACTOR * 30
    wait.paused_s = 25
    assert order.idle_s(wait, 100) == 75 - BACKLOG_FACTOR * 30
    order.record(wait, 100)
    assert order.idle_s(wait, 110) == 10


def test_an_older_session_of_another_gateway_goes_first() -> None:
    order, waiting = TurnOrder(), new(100)
    order.record_elsewhere("pool", 90, 150)
    order.record_elsewhere("pool", 110, 160)
    order.record_elsewhere("phones", 90, 170)
    assert order.idle_s(waiting, 200) == 50
    order.record_elsewhere("pool", 80, 140)
    assert order.idle_s(waiting, 200) == 50, "what is read later may be older"
    assert order.idle_s(new(85), 200) == 60
    order.record_elsewhere("pool", 80, 190)
    assert order.idle_s(waiting, 200) == 10
    order.record(waiting, 200)
    order.record_elsewhere("pool", 80, 250)
    assert order.idle_s(waiting, 260) == 60


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=30), st.floats(0, 100))
def test_turns_are_read_in_any_order(turns: list[tuple[float, float]], started_s: float) -> None:
    order = TurnOrder()
    for key, time_s in turns:
        order.record_elsewhere("pool", key, time_s)
    exact_s = 200 - max([started_s, *(time_s for key, time_s in turns if key <= started_s)])
    assert exact_s - 1e-9 <= order.idle_s(new(started_s), 200) <= exact_s + RESOLUTION_S + 1e-9


def test_old_turns_are_forgotten_and_memory_is_bounded() -> None:
    order, running = TurnOrder(), new(0)
    for step in range(10_000):
        order.record(running, 1 + step / 1000)
    assert len(order._by_wait.keys) <= 2 * 10 / RESOLUTION_S + 2
    order.forget(100)
    assert not order._by_wait.keys
    assert not order._by_start


steps = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 30)), max_size=40)


@given(steps, st.floats(0, 100))
def test_idle_times_agree_with_a_list_of_all_turns(taken: list[tuple[int, float]], started_s: float) -> None:
    order, waits, turns, now_s = TurnOrder(), [new(10.0 * number) for number in range(6)], [], 50.0
    for number, passed_s in taken:
        now_s += passed_s
        turns.append((waits[number].since_s, waits[number].started_s, now_s))
        order.record(waits[number], now_s)
    now_s += 100
    wait = new(started_s)
    before = [at for since_s, start_s, at in turns if since_s <= started_s + OVERTAKING_S or start_s <= started_s]
    exact_s = now_s - max([started_s, *before])
    assert exact_s - 1e-9 <= order.idle_s(wait, now_s) <= exact_s + RESOLUTION_S + 1e-9
