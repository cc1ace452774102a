"""Queues of remote devices: each is consumed at its own pace and checked by its `DeviceGate`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

from services.scheduler import metrics
from services.scheduler.core.device_gate import DeviceGate, RoundRefused
from shared.broker.client import Broker
from shared.broker.incoming import UntrustedSender
from shared.broker.session_keys import SessionKeys
from shared.broker.topology import ROUND_BYTES
from shared.errors import BrokersError, SettingsError
from shared.messages import Message, Verify
from shared.runtime import logging
from shared.runtime.settings import read_devices

LOOK_S = 1.0
"""Time between two reads of the devices file."""
RETRY_LOOKS = 15
"""Devices that could not join are retried every this many reads; their queues may exist by then."""
PREFETCH = 8
"""Most unacknowledged rounds of a device. The scheduler handles them one after the other."""


class DeviceQueues:
    """Consumers of the queues of the devices in a file."""

    def __init__(
        self,
        file: Path,
        broker: Broker,
        take: Callable[[Verify], None],
        due_ms: Callable[[str], float | None],
        session_keys: SessionKeys,
        rounds_per_s: float,
    ) -> None:
        """take: called with each accepted round. due_ms: returns when a session's next token is due.

        Raises SettingsError when the file cannot be read.
        """
        self._file = file
        self._broker = broker
        self._take = take
        self._due_ms = due_ms
        self._session_keys = session_keys
        self._rounds_per_s = rounds_per_s
        self._wanted = read_devices(file)
        self._cancels: dict[str, Callable[[], Awaitable[None]]] = {}
        self._log = logging.get()

    async def follow(self) -> None:
        """Start consumers for new devices in the file, and cancel those of removed devices."""
        for device in set(self._cancels) - set(self._wanted):
            await self._cancels.pop(device)()
            self._log.info("device left", device=device)
        for device in self._wanted:
            if device not in self._cancels:
                try:
                    self._cancels[device] = await self._join(device)
                    self._log.info("device joined", device=device)
                except BrokersError as error:
                    self._log.error("device cannot join", device=device, error=str(error))

    async def watch(self) -> None:
        """Follow the file for ever. While it cannot be read, the last devices stay."""
        failed = ""
        for look in count():
            await asyncio.sleep(LOOK_S)
            try:
                wanted = await asyncio.to_thread(read_devices, self._file)
            except SettingsError as error:
                if str(error) != failed:
                    self._log.error("devices file not read, keeping the last devices", error=str(error))
                failed = str(error)
                continue
            failed = ""
            retry = look % RETRY_LOOKS == 0 and len(self._cancels) < len(self._wanted)
            if wanted != self._wanted or retry:
                self._wanted = wanted
                await self.follow()

    async def _join(self, device: str) -> Callable[[], Awaitable[None]]:
        """Start consuming a device's queue; return what cancels it."""
        gate = DeviceGate(device, self._session_keys, self._rounds_per_s)
        turn = asyncio.Lock()

        async def refuse(reason: str) -> None:
            metrics.ROUNDS_REFUSED.labels(device).inc()
            self._log.warning("device's message refused", device=device, reason=reason[:300])

        async def paced() -> None:
            if (wait_ms := gate.wait_ms(_now_ms())) > 0:
                await asyncio.sleep(wait_ms / 1000)

        async def undecodable(reason: str) -> None:
            async with turn:
                await paced()
                await refuse(reason)

        async def receive(message: Message) -> None:
            # Acknowledged only after its turn, so that the broker holds back, and drops, what exceeds the rate.
            async with turn:
                await paced()
                due_ms = self._due_ms(message.session) if isinstance(message, Verify) else None
                try:
                    self._take(gate.check(message, due_ms, _now_ms()))
                except RoundRefused as error:
                    await refuse(str(error))

        queue = self._broker.topology.rounds_queue(device)
        return await self._broker.consume(
            queue, receive, prefetch=PREFETCH, sender=UntrustedSender(ROUND_BYTES, undecodable)
        )


def _now_ms() -> float:
    return time.monotonic() * 1000
