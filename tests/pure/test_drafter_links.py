"""The contract of a session's link, direct or emulated, and the differences between the two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import builders
import pytest
from patience import HANG_S

from services.drafter.control import RoundTimes
from services.drafter.core.draft import Draft
from services.drafter.core.profile import HardwareProfile, parse_profile
from services.drafter.link import DirectLink, EmulatedLink, Link
from shared.messages import HiddenStates, Result, Verify

PROFILE = """
[draft]
step_ms = 4
prompt_ms = 1
[uplink]
delay_ms = 1
jitter_ms = 1
[downlink]
delay_ms = 1
jitter_ms = 1
"""
DRAFT = Draft([5, 6, 7], {"model": 3}, computed=2)


@dataclass
class Ends:
    """Both ends of a link: rounds that reached the schedulers, messages that reached the session."""

    sent: asyncio.Queue[Verify] = field(default_factory=asyncio.Queue)
    delivered: asyncio.Queue[Result | HiddenStates] = field(default_factory=asyncio.Queue)

    async def send(self, verify: Verify) -> None:
        await self.sent.put(verify)

    async def deliver(self, message: Result | HiddenStates) -> None:
        await self.delivered.put(message)


@pytest.fixture
def ends() -> Ends:
    return Ends()


@pytest.fixture
def profile() -> HardwareProfile:
    return parse_profile(PROFILE, "test")


@pytest.fixture(params=["direct", "emulated"])
async def link(request: pytest.FixtureRequest, ends: Ends, profile: HardwareProfile) -> AsyncIterator[Link]:
    opened: Link
    if request.param == "direct":
        opened = DirectLink(ends.send, ends.deliver)
    else:
        opened = EmulatedLink(profile, "s", ends.send, ends.deliver)
    yield opened
    opened.close()


async def test_messages_arrive_in_order_in_both_directions(link: Link, ends: Ends) -> None:
    rounds = [builders.verify(round_=number) for number in range(20)]
    results = [builders.result(round_=number) for number in range(20)]
    for verify, result in zip(rounds, results, strict=True):
        await link.send(verify)
        await link.receive(result)
    async with asyncio.timeout(HANG_S):
        assert [await ends.sent.get() for _ in rounds] == rounds
        assert [await ends.delivered.get() for _ in results] == results


async def test_a_session_waits_for_its_draft_once_it_is_made(link: Link) -> None:
    assert await link.wait_for_draft(link.draft_ms(DRAFT, 2.0), 2.0)


async def test_a_direct_link_takes_measured_times(ends: Ends) -> None:
    link, times = DirectLink(ends.send, ends.deliver), RoundTimes()
    link.learn_draft(times, DRAFT, call_ms=30.0)
    assert times.step_ms("model") == 10.0
    assert link.draft_ms(DRAFT, measured_ms=31.0) == 31.0
    assert link.made_ahead([DRAFT, DRAFT], elapsed_ms=0.0) == 2


async def test_an_emulated_link_takes_the_times_of_its_profile(ends: Ends, profile: HardwareProfile) -> None:
    link, times = EmulatedLink(profile, "s", ends.send, ends.deliver), RoundTimes()
    link.learn_draft(times, DRAFT, call_ms=30.0)
    assert times.step_ms("model") == 4.0
    assert link.draft_ms(DRAFT, measured_ms=31.0) == 3 * 4.0 + 1.0
    # A step for the draft in flight, and then 13 ms for each.
    made = [link.made_ahead([DRAFT, DRAFT], elapsed_ms) for elapsed_ms in (16.9, 17.0, 29.9, 30.0, 99.0)]
    assert made == [0, 1, 1, 2, 2]
    link.close()


async def test_cancelling_ends_the_wait_for_an_emulated_draft(ends: Ends, profile: HardwareProfile) -> None:
    link = EmulatedLink(profile, "s", ends.send, ends.deliver)
    waiting = asyncio.create_task(link.wait_for_draft(draft_ms=60_000.0, measured_ms=0.0))
    await asyncio.sleep(0)
    link.cancel()
    assert not await asyncio.wait_for(waiting, HANG_S)
    assert not await link.wait_for_draft(draft_ms=0.0, measured_ms=0.0), "a cancelled session stays cancelled"
    link.close()


async def test_a_message_that_cannot_be_delivered_does_not_stop_an_emulated_link(
    ends: Ends, profile: HardwareProfile
) -> None:
    async def send(verify: Verify) -> None:
        if verify.round == 0:
            raise ConnectionError("the broker is gone")
        await ends.send(verify)

    link = EmulatedLink(profile, "s", send, ends.deliver)
    await link.send(builders.verify(round_=0))
    await link.send(builders.verify(round_=1))
    assert (await asyncio.wait_for(ends.sent.get(), HANG_S)).round == 1
    link.close()
