"""Sessions that wait: for a drafter, behind others, for the store; stalls and pauses."""

from __future__ import annotations

import asyncio
from time import monotonic

import builders
import httpx
import memory_store
import pytest
from gateway_app import App, error_of
from gateway_memory import MemoryTransport
from gateway_peer import Script, eventually, results_of
from patience import HANG_S

from services.gateway import sessions, silence
from services.gateway.core.turns import TurnOrder
from shared.broker import topology
from shared.messages import Generate, Message
from shared.models.folder import ModelFolder
from shared.state.sessions import SessionStatus


async def test_a_stalled_session_times_out_and_is_cancelled(folder: ModelFolder) -> None:
    app = App(folder, stall_timeout_s=0.3)
    app.silent = True
    app.script = Script(text="")
    watching = asyncio.create_task(app.sessions.watch())
    for stream in (True, False):
        assert error_of(await app.chat(stream=stream), 504)["code"] == "timeout"
    await eventually(lambda: len(app.services.cancelled) == 2)
    watching.cancel()


@pytest.mark.parametrize(
    ("running_in", "mixes", "code"),
    [
        ({"other", "a third"}, False, "arithmetic_unavailable"),
        ({"other", "wisp-1"}, False, "timeout"),
        ({"other", ""}, False, "timeout"),
        ({"other"}, True, "timeout"),
        (set(), False, "timeout"),
    ],
)
async def test_a_session_that_waits_for_its_arithmetic_ends_with_that_reason(
    folder: ModelFolder, running_in: set[str], mixes: bool, code: str
) -> None:
    app = App(folder, stall_timeout_s=0.3)
    app.script = Script(text="Hello there", ends=False, arithmetics=("wisp-1",))
    app.running_in = running_in
    await app.sessions.receive(builders.load(mixed_arithmetic=mixes))
    watching = asyncio.create_task(app.sessions.watch())
    error = error_of(await app.chat(), 503 if code == "arithmetic_unavailable" else 504)
    assert error["code"] == code
    if code == "arithmetic_unavailable":
        assert (
            "computed in the arithmetic wisp-1, and the running verifiers have another (a third; other)"
            in error["message"]
        )
    await eventually(lambda: len(app.services.cancelled) == 1)
    watching.cancel()


async def test_a_long_prompt_in_prefill_chunks_is_not_given_up(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped_s = 0.0
    for module in (sessions, silence):
        monkeypatch.setattr(module, "monotonic", lambda: monotonic() + skipped_s)
    app = App(folder, stall_timeout_s=60)

    async def work(message: Message) -> None:
        nonlocal skipped_s
        assert isinstance(message, Generate)
        chunk, *rounds = results_of(message, app.script, app.tokenizer)
        for number in range(3):
            skipped_s += 50
            await asyncio.sleep(2 * silence.WATCH_INTERVAL_S)
            await app.services.publish("g", chunk.model_copy(update={"batch": f"chunk{number}"}))
        for result in rounds:
            await app.services.commit(message.session, result.tokens, result.finish)
            await app.services.publish("g", result)

    app.services.draft = work
    watching = asyncio.create_task(app.sessions.watch())
    response = await app.chat()
    watching.cancel()
    assert response.json()["choices"][0]["message"]["content"] == app.script.text


class Clock:
    """The clock of the sessions and of the services behind them. It stands still until a test sets it forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now_s = monotonic()
        self._looks = 0
        for module in (sessions, silence, memory_store):
            monkeypatch.setattr(module, "monotonic", lambda: self._now_s)
        monkeypatch.setattr(silence, "WATCH_INTERVAL_S", 0.005)
        forget = TurnOrder.forget

        def look(turns: TurnOrder, before_s: float) -> None:
            self._looks += 1
            forget(turns, before_s)

        monkeypatch.setattr(TurnOrder, "forget", look)

    async def _watched(self) -> None:
        """Wait until the watch has looked at all sessions, and what it began has ended."""
        wanted = self._looks + 3
        await eventually(lambda: self._looks >= wanted)

    async def skip(self, seconds: float) -> None:
        """Let time pass in steps that are no pause, and the watch look at each."""
        for _ in range(round(seconds / 0.9)):
            self._now_s += 0.9
            await self._watched()

    async def pause(self, seconds: float) -> None:
        """Let the whole process stand still for so long."""
        self._now_s += seconds
        await self._watched()


async def serve_in_turn(app: App, clock: Clock, count: int, each_s: float) -> list[httpx.Response]:
    """Send requests at once, of which one is served after the other."""
    app.services.draft = None
    asking = [asyncio.create_task(app.chat()) for _ in range(count)]
    await eventually(lambda: len(app.generated) == count)
    await clock.pause(0)  # all of them wait
    for generate in app.generated:
        await clock.skip(each_s)
        await app.work(generate)
    return await asyncio.gather(*asking)


async def test_waiting_behind_others_is_no_stall(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    watching = asyncio.create_task(app.sessions.watch())
    responses = await serve_in_turn(app, clock, 10, 3.6)
    watching.cancel()
    assert [response.status_code for response in responses] == [200] * 10


async def test_waiting_behind_others_has_a_limit_of_its_own(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5, queue_timeout_s=10), Clock(monkeypatch)
    watching = asyncio.create_task(app.sessions.watch())
    responses = await serve_in_turn(app, clock, 4, 3.6)
    watching.cancel()
    assert [response.status_code for response in responses] == [200, 200, 503, 503]
    error = error_of(responses[2], 503)
    assert error["code"] == "queue_timeout"
    assert "WISP_QUEUE_TIMEOUT_S" in error["message"]
    assert responses[2].headers["retry-after"] == "10"
    await eventually(lambda: len(app.services.cancelled) == 2)


async def test_a_session_on_which_nobody_works_stalls_beside_others(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    watching = asyncio.create_task(app.sessions.watch())
    app.script = Script(text="", ends=False)
    stuck = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 1)
    app.script = Script()
    for _ in range(14):
        await clock.skip(0.9)
        assert (await app.chat()).status_code == 200
    error = error_of(await asyncio.wait_for(stuck, HANG_S), 504)
    watching.cancel()
    assert error["code"] == "timeout"


async def test_a_pause_of_the_process_is_no_stall(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    app.services.draft = None
    watching = asyncio.create_task(app.sessions.watch())
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 1)
    for _ in range(3):
        await clock.pause(40)
    await app.work(app.generated[0])
    assert (await asking).status_code == 200
    stuck = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 2)
    await clock.skip(6)
    watching.cancel()
    assert error_of(await stuck, 504)["code"] == "timeout"


async def test_the_backlog_of_other_gateways_is_waited_for(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    app.services.draft = None
    watching = asyncio.create_task(app.sessions.watch())
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 1)
    await app.sessions.receive(builders.load(backlog_ms=4000.0, verifiers=1))
    await clock.skip(11)
    assert not asking.done()
    await clock.skip(4)
    watching.cancel()
    assert error_of(await asking, 504)["code"] == "timeout"


async def test_waiting_behind_another_gateways_sessions_is_no_stall(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    app.services.draft = None
    other = MemoryTransport(app.services, "other")
    await other.start(builders.generate("older", gateway="other"), topology.DEFAULT_POOL)
    watching = asyncio.create_task(app.sessions.watch())
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 2)
    await other.start(builders.generate("younger", gateway="other"), topology.DEFAULT_POOL)
    for session_id, passes_s in (("older", 13.5), ("younger", 1.8)):
        for _ in range(round(passes_s / 0.9)):
            await app.services.commit(session_id, [7])
            await clock.skip(0.9)
        assert not asking.done()
    await clock.skip(4.5)
    watching.cancel()
    assert error_of(await asking, 504)["code"] == "timeout"


@pytest.mark.parametrize("without_room", [0, 1])
async def test_waiting_for_room_behind_another_pool_is_no_stall(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, without_room: int
) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    app.services.draft = None
    other = MemoryTransport(app.services, "other")
    app.services.pools.add("elsewhere")
    await other.start(builders.generate("older", gateway="other"), "elsewhere")
    watching = asyncio.create_task(app.sessions.watch())
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 2)
    for _ in range(15):
        await app.sessions.receive(builders.load(without_room=without_room, verifiers=1))
        await app.services.commit("older", [7])
        await clock.skip(0.9)
    assert asking.done() == (not without_room)
    await app.sessions.receive(builders.load(verifiers=1))
    await clock.skip(1)
    assert asking.done() == (not without_room), "it has room now, and its prompt takes a moment"
    await clock.skip(4.5)
    watching.cancel()
    assert error_of(await asking, 504)["code"] == "timeout"


async def test_a_session_without_results_is_answered_from_its_state(folder: ModelFolder) -> None:
    app = App(folder, idle_check_s=0.1)
    app.silent = True
    watching = asyncio.create_task(app.sessions.watch())
    response = await app.chat()
    watching.cancel()
    assert response.json()["choices"][0]["message"]["content"] == app.script.text


def delay_start(app: App, monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    """Let every session take this long to be stored."""
    start = app.transport.start

    async def slow(generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        await asyncio.sleep(delay_s)
        await start(generate, pool, resume_record)

    monkeypatch.setattr(app.transport, "start", slow)


async def test_sessions_that_are_stored_late_are_not_lost(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(folder, idle_check_s=0.1)
    delay_start(app, monkeypatch, 0.6)
    watching = asyncio.create_task(app.sessions.watch())
    response = await app.chat(n=3)
    watching.cancel()
    assert [choice["message"]["content"] for choice in response.json()["choices"]] == [app.script.text] * 3


async def test_a_session_that_ends_while_it_is_stored_is_cancelled(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App(folder)
    app.services.draft = None
    start = app.transport.start

    async def unconfirmed(generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        await start(generate, pool, resume_record)
        await asyncio.Event().wait()  # as long as RabbitMQ is frozen

    monkeypatch.setattr(app.transport, "start", unconfirmed)
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: app.sessions.running == 1 and bool(app.services.store.sessions))
    await app.sessions.drain(0)
    error = error_of(await asyncio.wait_for(asking, HANG_S), 503)
    assert error["code"] == "shutting_down"
    await eventually(lambda: {one.status for one in app.services.store.sessions.values()} == {SessionStatus.CANCELLED})
