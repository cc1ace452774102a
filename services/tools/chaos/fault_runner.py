"""Injection of a schedule's faults: each fault for its duration, and the recovery of its target."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from services.tools.chaos import message_faults
from services.tools.chaos.core.faults import Fault, FaultKind
from services.tools.chaos.core.verdicts import InjectedFault
from services.tools.chaos.site import ChaosSite
from services.tools.local.process import Process

SLOW_S = 0.15
"""Delay of a slow link, in each direction."""
ALARMS = {
    FaultKind.MEMORY_ALARM: ("set_vm_memory_high_watermark", ("0.000001",), ("absolute", "1GiB")),
    FaultKind.DISK_ALARM: ("set_disk_free_limit", ("1000000GB",), ("16MB",)),
}
"""RabbitMQ's limits: the command, a value that is always exceeded, and the usual value."""
DRAIN_GRACE_S = 30.0
POLL_S = 0.5
"""Pause between two checks for a process that can take a fault, while all of a service are starting or ending."""
NEW_QUEUES_S = 8.0
"""RabbitMQ 3.10 forgets the members of a quorum queue if it is killed within seconds of declaring it; the queue then
never gets a leader again (`rabbitmqctl delete_queue` repairs it). So RabbitMQ takes no fault for this long after its
queues were declared."""


@dataclass
class FaultRunner:
    """Injects faults into a site."""

    site: ChaosSite
    done: list[InjectedFault] = field(default_factory=list)
    """Every fault that has begun."""
    poisoned: int = 0
    """Messages that must become dead letters."""
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    """One for each resource that takes one fault at a time."""
    _busy_processes: set[int] = field(default_factory=set)

    async def run(self, faults: Sequence[Fault], lanes: int) -> None:
        """Inject all faults, at most `lanes` at a time."""
        pending = list(faults)

        async def lane() -> None:
            while pending:
                fault = pending.pop(0)
                await self.inject(fault)
                await asyncio.sleep(fault.gap_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(lanes):
                tasks.create_task(lane())

    async def inject(self, fault: Fault) -> None:
        """Inject one fault; return when its target is back."""
        if fault.kind.resource == "process":
            await self._hit_process(fault)
            return
        async with self._locks.setdefault(fault.kind.resource, asyncio.Lock()):
            record = InjectedFault(fault, fault.kind.resource, time.monotonic())
            self.done.append(record)
            match fault.kind.resource:
                case "link":
                    await self._hit_link(fault, record)
                case "messages":
                    await self._hit_messages(fault)
                case _:
                    await self._hit_broker(fault)
            record.ended_s = time.monotonic()

    async def _hit_broker(self, fault: Fault) -> None:
        kind = fault.kind
        if kind is FaultKind.FREEZE_REDIS:
            await _freeze(self.site.redis.processes[0], fault.hold_s)
        elif kind in ALARMS:
            command, alarming, usual = ALARMS[kind]
            await self.site.control_rabbitmq(command, *alarming)
            await asyncio.sleep(fault.hold_s)
            await self.site.control_rabbitmq(command, *usual)
        else:
            server = self.site.rabbitmq if kind.resource == "rabbitmq" else self.site.redis
            await server.kill()
            await asyncio.sleep(fault.hold_s)
            await server.restart(lose_data=kind.loses_data)
            if kind is FaultKind.LOSE_RABBITMQ:
                await asyncio.sleep(NEW_QUEUES_S)

    async def _hit_messages(self, fault: Fault) -> None:
        where = self.site.brokers.amqp_url, self.site.stack.namespace
        match fault.kind:
            case FaultKind.DUPLICATES:
                await message_faults.duplicate(*where, fault.number, fault.hold_s)
            case FaultKind.LOST_ROUNDS:
                await message_faults.lose_rounds(*where, fault.number, fault.hold_s)
            case _:
                names = [process.name for process in self.site.stack.processes()]
                with suppress(*CONNECTION_EXCEPTIONS):
                    self.poisoned += await message_faults.poison(*where, names)

    async def _hit_process(self, fault: Fault) -> None:
        service = fault.kind.service
        assert service is not None
        while not (idle := self._idle(service)):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(POLL_S)
        process = _picked(idle, fault)
        record = InjectedFault(fault, process.name, time.monotonic())
        self.done.append(record)
        self._busy_processes.add(process.pid)
        if fault.kind.value.startswith("freeze"):
            await _freeze(process, fault.hold_s)
            self._busy_processes.discard(process.pid)
        else:
            # The process stays marked as busy, so that it takes no other fault while it ends.
            killed = fault.kind.value.startswith("kill")
            await self.site.stack.stop(process, signal.SIGKILL if killed else signal.SIGTERM, DRAIN_GRACE_S)
            await asyncio.sleep(fault.hold_s)
            await self.site.start(service)
        record.ended_s = time.monotonic()

    def _idle(self, service: str) -> list[Process]:
        return [process for process in self.site.ready(service) if process.pid not in self._busy_processes]

    async def _hit_link(self, fault: Fault, record: InjectedFault) -> None:
        linked = [process for process in self.site.stack.processes() if process.pid in self.site.links]
        if not linked:
            return
        process = _picked(linked, fault)
        record.target = process.name
        relay = self.site.links[process.pid]
        if fault.kind is FaultKind.SLOW_LINK:
            relay.one_way_s = SLOW_S
            await asyncio.sleep(fault.hold_s)
            relay.one_way_s = 0.0
            return
        if fault.kind is FaultKind.CUT_LINK:
            await relay.cut()
        else:
            relay.hold()
        await asyncio.sleep(fault.hold_s)
        relay.mend()


def _picked(processes: Sequence[Process], fault: Fault) -> Process:
    return processes[min(int(fault.pick * len(processes)), len(processes) - 1)]


async def _freeze(process: Process, hold_s: float) -> None:
    process.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(hold_s)
    finally:
        process.send(signal.SIGCONT)
