"""The queues of devices outside the cluster: read one by one, each at its own pace, past its gate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

from services.scheduler import metrics
from services.scheduler.core.device_gate import Gate, Refused
from shared.broker.client import Broker, Stranger
from shared.broker.devices import read_devices
from shared.broker.seal import Seal
from shared.broker.topology import ROUND_BYTES
from shared.errors import BrokersError, SettingsError
from shared.messages import Message, Verify
from shared.runtime import logging

LOOK_S = 1.0
"""Time between two looks at the file."""
RETRY_LOOKS = 15
"""After so many looks, those are tried again that could not join: their queues may be there now."""
PREFETCH = 8
"""Rounds of a device that are on their way to the scheduler at once. It handles them one after the other."""


class Devices:
    """The devices in a file, while they are in it."""

    def __init__(
        self,
        file: Path,
        broker: Broker,
        take: Callable[[Verify], None],
        due_ms: Callable[[str], float | None],
        seal: Seal,
        rounds_per_s: float,
    ) -> None:
        """Raises SettingsError when the file cannot be read now."""
        self._file = file
        self._broker = broker
        self._take = take
        self._due_ms = due_ms
        self._seal = seal
        self._rounds_per_s = rounds_per_s
        self._wanted = read_devices(file)
        self._ends: dict[str, Callable[[], Awaitable[None]]] = {}
        self._log = logging.get()

    async def follow(self) -> None:
        """Read the queues of the devices in the file, and no others'."""
        for device in set(self._ends) - set(self._wanted):
            await self._ends.pop(device)()
            self._log.info("device left", device=device)
        for device in self._wanted:
            if device not in self._ends:
                try:
                    self._ends[device] = await self._join(device)
                    self._log.info("device joined", device=device)
                except BrokersError as error:
                    self._log.error("device cannot join", device=device, error=str(error))

    async def watch(self) -> None:
        """Follow the file, for ever. One that cannot be read any more leaves those of before."""
        failed = ""
        for look in count():
            await asyncio.sleep(LOOK_S)
            try:
                wanted = await asyncio.to_thread(read_devices, self._file)
            except SettingsError as error:
                if str(error) != failed:
                    self._log.error("devices not read: those of before stay", error=str(error))
                failed = str(error)
                continue
            failed = ""
            late = look % RETRY_LOOKS == 0 and len(self._ends) < len(self._wanted)
            if wanted != self._wanted or late:
                self._wanted = wanted
                await self.follow()

    async def _join(self, device: str) -> Callable[[], Awaitable[None]]:
        gate = Gate(device, self._seal, self._rounds_per_s)
        turn = asyncio.Lock()

        async def refuse(reason: str) -> None:
            metrics.ROUNDS_REFUSED.labels(device).inc()
            self._log.warning("device's message refused", device=device, reason=reason[:300])

        async def paced() -> None:
            if (wait_ms := gate.wait_ms(_now_ms())) > 0:
                await asyncio.sleep(wait_ms / 1000)

        async def rubbish(reason: str) -> None:
            async with turn:
                await paced()
                await refuse(reason)

        async def receive(message: Message) -> None:
            # Not acknowledged before its turn, so that the broker holds back, and drops, what is too much.
            async with turn:
                await paced()
                due_ms = self._due_ms(message.session) if isinstance(message, Verify) else None
                try:
                    self._take(gate.check(message, due_ms, _now_ms()))
                except Refused as error:
                    await refuse(str(error))

        queue = self._broker.topology.rounds_queue(device)
        return await self._broker.consume(queue, receive, prefetch=PREFETCH, stranger=Stranger(ROUND_BYTES, rubbish))


def _now_ms() -> float:
    return time.monotonic() * 1000
