"""Doing what a schedule says: each fault, for as long as it lasts, and back."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from services.tools.chaos import message_faults as injector
from services.tools.chaos.core.faults import Fault, Kind
from services.tools.chaos.site import Site
from services.tools.local.process import Process

SLOW_S = 0.15
"""Added to each direction of a slow link."""
ALARMS = {
    Kind.MEMORY_ALARM: ("set_vm_memory_high_watermark", ("0.000001",), ("absolute", "1GiB")),
    Kind.DISK_ALARM: ("set_disk_free_limit", ("1000000GB",), ("16MB",)),
}
"""RabbitMQ's limits: the command, one that is always exceeded, and the one in peace."""
DRAIN_GRACE_S = 30.0
NONE_S = 0.5
"""Pause while every process of a service is on its way out or in."""
SETTLED_S = 8.0
"""RabbitMQ 3.10 forgets the members of a quorum queue that it was killed within seconds of declaring, and has no leader
for it ever after (`rabbitmqctl delete_queue` helps). So it is left alone for a while when its queues are new."""


@dataclass
class Hit:
    """A fault that was done. Times are seconds of `time.monotonic`."""

    fault: Fault
    target: str
    began_s: float
    ended_s: float = 0.0
    """When what it hit was there again."""


@dataclass
class Hits:
    """Does faults to a site."""

    site: Site
    done: list[Hit] = field(default_factory=list)
    poisoned: int = 0
    """Messages that have to be dead letters."""
    _busy: dict[str, asyncio.Lock] = field(default_factory=dict)
    _busy_processes: set[int] = field(default_factory=set)

    async def do(self, faults: Sequence[Fault], lanes: int) -> None:
        """All of them, at most `lanes` at a time."""
        left = list(faults)

        async def lane() -> None:
            while left:
                fault = left.pop(0)
                await self.hit(fault)
                await asyncio.sleep(fault.gap_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(lanes):
                tasks.create_task(lane())

    async def hit(self, fault: Fault) -> None:
        """One fault; returns when what it hit is there again."""
        kind = fault.kind
        if kind.hits == "process":
            await self._process(fault)
            return
        async with self._busy.setdefault(kind.hits, asyncio.Lock()):
            record = Hit(fault, kind.hits, time.monotonic())
            self.done.append(record)
            match kind:
                case Kind.KILL_RABBITMQ | Kind.LOSE_RABBITMQ | Kind.KILL_REDIS | Kind.LOSE_REDIS:
                    server = self.site.rabbitmq if kind.hits == "rabbitmq" else self.site.redis
                    await server.kill()
                    await asyncio.sleep(fault.hold_s)
                    await server.restart(lose_data=kind.loses_data)
                    if kind is Kind.LOSE_RABBITMQ:
                        await asyncio.sleep(SETTLED_S)
                case Kind.FREEZE_REDIS:
                    await _freeze(self.site.redis.processes[0], fault.hold_s)
                case Kind.MEMORY_ALARM | Kind.DISK_ALARM:
                    command, alarming, calm = ALARMS[kind]
                    await self.site.control_rabbitmq(command, *alarming)
                    await asyncio.sleep(fault.hold_s)
                    await self.site.control_rabbitmq(command, *calm)
                case Kind.CUT_LINK | Kind.DEAD_LINK | Kind.SLOW_LINK:
                    await self._link(fault, record)
                case Kind.DUPLICATES:
                    await injector.duplicate(*self._where, fault.number, fault.hold_s)
                case Kind.LOST_ROUNDS:
                    await injector.lose_rounds(*self._where, fault.number, fault.hold_s)
                case Kind.POISON:
                    names = [process.name for process in self.site.stack.processes()]
                    with suppress(*CONNECTION_EXCEPTIONS):
                        self.poisoned += await injector.poison(*self._where, names)
            record.ended_s = time.monotonic()

    @property
    def _where(self) -> tuple[str, str]:
        return self.site.brokers.amqp_url, self.site.stack.namespace

    async def _process(self, fault: Fault) -> None:
        service = fault.kind.service
        assert service is not None
        while not (there := self._free(service)):  # noqa: ASYNC110 - one look now and then is enough
            await asyncio.sleep(NONE_S)
        process = there[min(int(fault.pick * len(there)), len(there) - 1)]
        record = Hit(fault, process.name, time.monotonic())
        self.done.append(record)
        if fault.kind.value.startswith("freeze"):
            self._busy_processes.add(process.pid)
            await _freeze(process, fault.hold_s)
            self._busy_processes.discard(process.pid)
        else:
            killed = fault.kind.value.startswith("kill")
            number = signal.SIGKILL if killed else signal.SIGTERM
            self._busy_processes.add(process.pid)  # nothing else is done to what is on its way out
            await self.site.stack.stop(process, number, DRAIN_GRACE_S)
            await asyncio.sleep(fault.hold_s)
            await self.site.start(service)
        record.ended_s = time.monotonic()

    def _free(self, service: str) -> list[Process]:
        return [process for process in self.site.ready(service) if process.pid not in self._busy_processes]

    async def _link(self, fault: Fault, record: Hit) -> None:
        there = [p for p in self.site.stack.processes() if p.pid in self.site.links]
        if not there:
            return
        process = there[min(int(fault.pick * len(there)), len(there) - 1)]
        record.target = process.name
        relay = self.site.links[process.pid]
        if fault.kind is Kind.CUT_LINK:
            await relay.cut()
            await asyncio.sleep(fault.hold_s)
            relay.mend()
        elif fault.kind is Kind.DEAD_LINK:
            relay.hold()
            await asyncio.sleep(fault.hold_s)
            relay.mend()
        else:
            relay.one_way_s = SLOW_S
            await asyncio.sleep(fault.hold_s)
            relay.one_way_s = 0.0


async def _freeze(process: Process, hold_s: float) -> None:
    process.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(hold_s)
    finally:
        process.send(signal.SIGCONT)
