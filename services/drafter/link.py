"""Waiting in the place of an emulated device: while it drafts, and while messages travel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from services.drafter.core.profile import DeviceProfile, Link, Travel, parse
from shared.errors import SettingsError
from shared.messages import HiddenStates, Result, Verify
from shared.runtime import logging

SHIPPED = Path(__file__).parent / "profiles"

M = TypeVar("M")


def load_profile(wanted: str) -> DeviceProfile | None:
    """The shipped profile of this name, or the one in this file; None if nothing is wanted. Raises SettingsError."""
    if not wanted:
        return None
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path = shipped.get(wanted, Path(wanted))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"no device profile {wanted} ({error}); give a TOML file or one of {', '.join(shipped)} "
            "(WISP_DEVICE_PROFILE)"
        ) from error
    return parse(text, wanted)


class EmulatedDevice:
    """The device of one session, from its first round until `close`."""

    def __init__(
        self,
        profile: DeviceProfile,
        session: str,
        send: Callable[[Verify], Awaitable[None]],
        receive: Callable[[Result | HiddenStates], Awaitable[None]],
    ) -> None:
        """send, receive: what to do with a message when it has arrived at the suite, and at the device."""
        self.profile = profile
        self._uplink = _Line(profile.uplink, f"{session} up", send)
        self._downlink = _Line(profile.downlink, f"{session} down", receive)
        self._cancelled = asyncio.Event()

    def send(self, verify: Verify) -> None:
        """Let it travel to the suite."""
        self._uplink.put(verify)

    def receive(self, message: Result | HiddenStates) -> None:
        """Let it travel to the device."""
        self._downlink.put(message)

    def cancel(self) -> None:
        """Nobody waits for the session any more: end `pause`."""
        self._cancelled.set()

    async def pause(self, ms: float) -> bool:
        """Let the device draft for so long; False if the session was cancelled before or meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, ms) / 1000):
                await self._cancelled.wait()
        return not self._cancelled.is_set()

    def close(self) -> None:
        """Drop what still travels."""
        self._uplink.close()
        self._downlink.close()


class _Line(Generic[M]):
    """One direction: each message is delivered when it has travelled, in order."""

    def __init__(self, link: Link, seed: str, deliver: Callable[[M], Awaitable[None]]) -> None:
        self._travel = Travel(link, seed)
        self._deliver = deliver
        self._travelling: asyncio.Queue[tuple[float, M]] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    def put(self, message: M) -> None:
        self._travelling.put_nowait((self._travel.arrival_ms(time.monotonic() * 1000), message))

    async def _run(self) -> None:
        while True:
            arrival_ms, message = await self._travelling.get()
            await asyncio.sleep(max(0.0, arrival_ms / 1000 - time.monotonic()))
            try:
                await self._deliver(message)
            except Exception:
                logging.get().exception("message lost on an emulated link")

    def close(self) -> None:
        self._task.cancel()
