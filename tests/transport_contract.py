"""The contract of the gateway's `Transport`: the same cases for the one in memory and the one over RabbitMQ and Redis.

A test module subclasses `TransportContract` and provides the fixture `services`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pytest
from builders import PROMPT, generate, result
from gateway_peer import eventually

from services.gateway.transport import Transport
from shared.broker.topology import DEFAULT_POOL
from shared.errors import Unroutable
from shared.messages import Ended, Finish, Generate, Message, Result, Slo
from shared.state.sessions import SessionStatus


@dataclass
class Received:
    """A gateway's transport, and the results that it received."""

    transport: Transport
    results: list[Result] = field(default_factory=list)

    async def receive(self, message: Message) -> None:
        """Keep a result."""
        assert isinstance(message, Result)
        self.results.append(message)

    @property
    def rounds(self) -> list[int]:
        """Round numbers of the results."""
        return [result.round for result in self.results]


class Services(Protocol):
    """The services behind the gateways `a` and `b`. Only DEFAULT_POOL has a drafter."""

    a: Received
    b: Received
    generated: list[tuple[str, Generate]]
    cancelled: list[str]
    ended: list[Ended]

    async def commit(self, session_id: str, tokens: Sequence[int], finish: Finish | None = None) -> None:
        """Add committed tokens to a session, as a verifier does."""

    async def publish(self, gateway: str, result: Result) -> None:
        """Send a result to a gateway."""


async def until(condition: Callable[[], bool]) -> None:
    await eventually(condition)


class TransportContract:
    """Cases for every transport."""

    async def test_a_started_session_reaches_a_drafter_of_its_pool(self, services: Services) -> None:
        asked = generate("s", gateway="a", slo=Slo(ttft_ms=900, tpot_ms=90), elapsed_ms=40.0)
        await services.a.transport.start(asked, DEFAULT_POOL)
        await until(lambda: bool(services.generated))
        ((pool, arrived),) = services.generated
        assert pool == DEFAULT_POOL
        assert arrived.elapsed_ms >= asked.elapsed_ms
        assert arrived.model_copy(update={"elapsed_ms": 40.0}) == asked

    async def test_a_pool_without_a_drafter_is_unroutable(self, services: Services) -> None:
        with pytest.raises(Unroutable):
            await services.a.transport.start(generate("s", gateway="a"), "phones")

    async def test_results_reach_the_gateway_that_started_the_session(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        await services.publish("a", result("s", round=3))
        await until(lambda: services.a.rounds == [3])
        assert services.b.results == []

    async def test_progress_gives_the_committed_tokens_from_a_position(self, services: Services) -> None:
        transport = services.a.transport
        await transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        start = await transport.progress("s", len(PROMPT))
        assert start is not None
        assert (start.status, start.length, start.tokens) == (SessionStatus.ACTIVE, len(PROMPT), [])
        await services.commit("s", [7, 8, 9])
        await services.commit("s", [10], Finish.STOP)
        end = await transport.progress("s", len(PROMPT) + 1)
        assert end is not None
        assert (end.status, end.length, end.tokens) == (SessionStatus.FINISHED, len(PROMPT) + 4, [8, 9, 10])
        assert end.finish is Finish.STOP

    async def test_an_unknown_session_has_no_progress(self, services: Services) -> None:
        assert await services.a.transport.progress("nobody", 0) is None

    async def test_a_cancelled_session_is_cancelled_for_all(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        await services.a.transport.cancel("s", "abort")
        await until(lambda: services.cancelled == ["s"])
        progress = await services.a.transport.progress("s", 0)
        assert progress is not None
        assert progress.status is SessionStatus.CANCELLED

    async def test_a_finished_session_stays_finished(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        await services.commit("s", [7], Finish.LENGTH)
        await services.a.transport.cancel("s", "abort")
        progress = await services.a.transport.progress("s", 0)
        assert progress is not None
        assert progress.status is SessionStatus.FINISHED

    async def test_the_resume_record_stays_with_the_first_session(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL, b"form")
        await services.a.transport.start(generate("s.1", gateway="a"), DEFAULT_POOL)
        assert await services.b.transport.resume_record("s") == b"form"
        assert await services.b.transport.resume_record("s.1") is None
        assert await services.b.transport.resume_record("nobody") is None

    async def test_a_stored_response_is_read_by_every_gateway(self, services: Services) -> None:
        await services.a.transport.store_response("resp_1", b"body")
        assert await services.b.transport.stored_response("resp_1") == b"body"
        assert await services.b.transport.stored_response("resp_2") is None

    async def test_a_collected_session_has_its_request_and_tokens(self, services: Services) -> None:
        asked = generate("s", gateway="a", max_tokens=9)
        await services.a.transport.start(asked, DEFAULT_POOL)
        await services.commit("s", [7, 8])
        async with services.b.transport.collect(["s"]) as (stored,):
            assert stored is not None
            assert (stored.request.gateway, stored.request.max_tokens) == ("a", 9)
            assert stored.tokens == [*PROMPT, 7, 8]
            assert stored.first_ms is not None
            assert (stored.status, stored.left_at) == (SessionStatus.ACTIVE, None)

    async def test_a_session_that_is_gone_cannot_be_collected(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        async with services.b.transport.collect(["s", "nobody"]) as stored:
            assert None in stored

    async def test_a_collected_session_is_no_longer_the_first_gateways_to_cancel(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        async with services.b.transport.collect(["s"]):
            await services.a.transport.cancel("s", "abort")
            progress = await services.b.transport.progress("s", 0)
            assert progress is not None
            assert progress.status is SessionStatus.ACTIVE
            await services.b.transport.cancel("s", "abort")
        await until(lambda: services.cancelled == ["s"])

    async def test_a_left_session_tells_its_length_to_the_next_gateway(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        await services.commit("s", [7, 8])
        await services.a.transport.leave("s", len(PROMPT) + 1)
        async with services.b.transport.collect(["s"]) as (stored,):
            assert stored is not None
            assert stored.left_at == len(PROMPT) + 1

    async def test_results_reach_the_collecting_gateway_while_it_collects(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        async with services.b.transport.collect(["s"]):
            await services.publish("a", result("s", round=1))
            await until(lambda: services.b.rounds == [1])
        assert await self._received_after(services) is False

    async def test_results_arrive_as_long_as_one_of_two_collections_lasts(self, services: Services) -> None:
        await services.a.transport.start(generate("s", gateway="a"), DEFAULT_POOL)
        async with services.b.transport.collect(["s"]):
            async with services.b.transport.collect(["s"]):
                pass
            await asyncio.sleep(0.2)  # a mistaken end of the first collection would take effect now
            await services.publish("a", result("s", round=5))
            await until(lambda: services.b.rounds == [5])

    async def test_the_turns_of_all_gateways_sessions_are_read(self, services: Services) -> None:
        for session_id, gateway in (("old", "a"), ("new", "b"), ("waiting", "a"), ("finished", "b")):
            asked = generate(session_id, gateway=gateway, elapsed_ms=5000.0 if session_id == "old" else 0.0)
            await getattr(services, gateway).transport.start(asked, DEFAULT_POOL)
        await services.commit("old", [7])
        await asyncio.sleep(0.2)
        await services.commit("new", [7])
        await services.commit("finished", [7], Finish.STOP)
        turns = {turn.session_id: turn for turn in await services.a.transport.turns()}
        assert {session_id: turn.pool for session_id, turn in turns.items()} == {
            "old": DEFAULT_POOL,
            "new": DEFAULT_POOL,
        }
        assert turns["old"].age_ms >= 5100 > turns["new"].age_ms >= turns["new"].idle_ms
        assert 5000 > turns["old"].idle_ms >= 100 + turns["new"].idle_ms

    async def test_the_end_of_a_session_is_announced(self, services: Services) -> None:
        ended = Ended(session="s", service_class="default", slo=None, reason="stop", prompt_tokens=3, tokens=4)
        await services.a.transport.report(ended)
        await until(lambda: services.ended == [ended])

    @staticmethod
    async def _received_after(services: Services) -> bool:
        """True if gateway `b` still receives the results of `a` a while after its collection has ended."""
        for attempt in range(100, 120):
            await services.publish("a", result("s", round=attempt))
            await services.publish("b", result("s", round=attempt + 1000))
            await until(lambda wanted=attempt + 1000: wanted in services.b.rounds)  # type: ignore[misc]
            if attempt not in services.b.rounds:
                return False
            await asyncio.sleep(0.1)
        return True
