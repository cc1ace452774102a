"""The link between a session's drafter and the suite: the broker's own, or that of emulated hardware.

A link also stands for the hardware that drafts: it gives the time of a draft, and lets the session wait for as long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from services.drafter import metrics
from services.drafter.control import RoundTimes
from services.drafter.core.draft import Draft
from services.drafter.core.profile import HardwareProfile, LinkDelays, LinkProfile, parse_profile
from shared.errors import SettingsError
from shared.messages import HiddenStates, Result, Verify
from shared.runtime import logging
from shared.twin.lateness import LATENESS

SHIPPED = Path(__file__).parent / "profiles"

TIMER_MS = 0.15
"""Mean time by which timers of the event loop, which count in milliseconds, are late. Waits are shorter by as much."""

M = TypeVar("M")
Send = Callable[[Verify], Awaitable[None]]
"""Publishes a round to the schedulers."""
Deliver = Callable[[Result | HiddenStates], Awaitable[None]]
"""Hands a received message to the session."""


def load_profile(wanted: str) -> HardwareProfile | None:
    """Load a shipped profile by name, or a TOML file by path; None for an empty name. Raises SettingsError."""
    if not wanted:
        return None
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path = shipped.get(wanted, Path(wanted))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"no hardware profile {wanted} ({error}); give a TOML file or one of {', '.join(shipped)} "
            "(WISP_DEVICE_PROFILE)"
        ) from error
    return parse_profile(text, wanted)


class Link(Protocol):
    """A session's link, from its first round until `close`."""

    async def send(self, verify: Verify) -> None:
        """Send a round to the schedulers."""

    async def receive(self, message: Result | HiddenStates) -> None:
        """Bring a message from a verifier to the session."""

    def learn_draft(self, times: RoundTimes, draft: Draft, call_ms: float) -> None:
        """Teach `times` how long the draft's steps take. call_ms: measured duration of the source's call."""

    def learn_probe(self, times: RoundTimes, draft: Draft, call_ms: float) -> None:
        """Teach `times` by a draft that was made while a round was in flight."""

    def draft_ms(self, draft: Draft, measured_ms: float) -> float:
        """Return the time that the draft takes on the session's hardware."""

    def made_ahead(self, drafts: Sequence[Draft], elapsed_ms: float) -> int:
        """Return how many of these drafts, in order, the session's hardware could prepare within `elapsed_ms`."""

    async def wait_for_draft(self, draft_ms: float, measured_ms: float) -> bool:
        """Wait until the session's hardware has made a draft that was made here in `measured_ms`.

        Returns False if the session is cancelled.
        """

    def cancel(self) -> None:
        """End `wait_for_draft`: the session is cancelled."""

    def close(self) -> None:
        """Drop the messages under way."""


class DirectLink:
    """The broker's own link; drafts take the time that they take here."""

    def __init__(self, send: Send, deliver: Deliver) -> None:
        self._send = send
        self._deliver = deliver

    async def send(self, verify: Verify) -> None:
        await self._send(verify)

    async def receive(self, message: Result | HiddenStates) -> None:
        await self._deliver(message)

    def learn_draft(self, times: RoundTimes, draft: Draft, call_ms: float) -> None:
        for source, steps in draft.steps.items():
            times.learn_draft(source, steps, call_ms, draft.computed)

    def learn_probe(self, times: RoundTimes, draft: Draft, call_ms: float) -> None:
        for source, steps in draft.steps.items():
            times.learn_probe(source, steps, call_ms, draft.computed)

    def draft_ms(self, draft: Draft, measured_ms: float) -> float:
        return measured_ms

    def made_ahead(self, drafts: Sequence[Draft], elapsed_ms: float) -> int:
        return len(drafts)

    async def wait_for_draft(self, draft_ms: float, measured_ms: float) -> bool:
        return True

    def cancel(self) -> None:
        pass  # a cancelled session ends with its round: `Cancel` is in its inbox

    def close(self) -> None:
        pass


class EmulatedLink:
    """The link and the drafting speed of emulated hardware, by real waiting."""

    def __init__(self, profile: HardwareProfile, session_id: str, send: Send, deliver: Deliver) -> None:
        self._profile = profile
        self._uplink = _DelayLine(profile.uplink, f"{session_id} up", send)
        self._downlink = _DelayLine(profile.downlink, f"{session_id} down", deliver)
        self._cancelled = asyncio.Event()

    async def send(self, verify: Verify) -> None:
        self._uplink.put(verify)

    async def receive(self, message: Result | HiddenStates) -> None:
        self._downlink.put(message)

    def learn_draft(self, times: RoundTimes, draft: Draft, call_ms: float) -> None:
        for source, steps in draft.steps.items():
            times.learn_draft(source, steps, self._profile.steps_ms(steps))

    def learn_probe(self, times: RoundTimes, draft: Draft, call_ms: float) -> None:
        self.learn_draft(times, draft, call_ms)

    def draft_ms(self, draft: Draft, measured_ms: float) -> float:
        return self._profile.draft_ms(draft)

    def made_ahead(self, drafts: Sequence[Draft], elapsed_ms: float) -> int:
        return self._profile.made_ahead(drafts, elapsed_ms)

    async def wait_for_draft(self, draft_ms: float, measured_ms: float) -> bool:
        metrics.DEVICE_LATE.inc(max(0.0, measured_ms - draft_ms) / 1000)
        end_s = time.monotonic() + (draft_ms - measured_ms) / 1000
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, draft_ms - measured_ms - TIMER_MS) / 1000):
                await self._cancelled.wait()
        if self._cancelled.is_set():
            return False
        if draft_ms:
            LATENESS.add(draft_ms, (time.monotonic() - end_s) * 1000)
        return True

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self._uplink.close()
        self._downlink.close()


class _DelayLine(Generic[M]):
    """One direction of an emulated link: delivers each message after its delay, in order."""

    def __init__(self, link: LinkProfile, seed: str, deliver: Callable[[M], Awaitable[None]]) -> None:
        self._delays = LinkDelays(link, seed)
        self._deliver = deliver
        self._under_way: asyncio.Queue[tuple[float, float, M]] = asyncio.Queue()
        """Times of sending and arrival, and the message."""
        self._task = asyncio.create_task(self._run())

    def put(self, message: M) -> None:
        now_ms = time.monotonic() * 1000
        self._under_way.put_nowait((now_ms, self._delays.arrival_ms(now_ms), message))

    async def _run(self) -> None:
        while True:
            sent_ms, arrival_ms, message = await self._under_way.get()
            await asyncio.sleep(max(0.0, (arrival_ms - TIMER_MS) / 1000 - time.monotonic()))
            LATENESS.add(arrival_ms - sent_ms, time.monotonic() * 1000 - arrival_ms)
            try:
                await self._deliver(message)
            except Exception:
                logging.get().exception("message lost on an emulated link")

    def close(self) -> None:
        self._task.cancel()
