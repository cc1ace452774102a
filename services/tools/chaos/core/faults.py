"""Schedules of faults, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """A kind of fault."""

    KILL_GATEWAY = "kill gateway"
    KILL_DRAFTER = "kill drafter"
    KILL_SCHEDULER = "kill scheduler"
    KILL_VERIFIER = "kill verifier"
    KILL_ESTIMATOR = "kill estimator"
    DRAIN_GATEWAY = "drain gateway"
    DRAIN_DRAFTER = "drain drafter"
    DRAIN_SCHEDULER = "drain scheduler"
    DRAIN_VERIFIER = "drain verifier"
    FREEZE_GATEWAY = "freeze gateway"
    FREEZE_DRAFTER = "freeze drafter"
    FREEZE_SCHEDULER = "freeze scheduler"
    FREEZE_VERIFIER = "freeze verifier"
    FREEZE_REDIS = "freeze Redis"
    KILL_RABBITMQ = "kill RabbitMQ"
    KILL_REDIS = "kill Redis"
    LOSE_RABBITMQ = "RabbitMQ loses its data"
    LOSE_REDIS = "Redis loses its data"
    MEMORY_ALARM = "memory alarm at RabbitMQ"
    DISK_ALARM = "disk alarm at RabbitMQ"
    CUT_LINK = "cut a link to RabbitMQ"
    DEAD_LINK = "a link to RabbitMQ passes nothing"
    SLOW_LINK = "slow link to RabbitMQ"
    DUPLICATES = "messages twice and late"
    LOST_ROUNDS = "rounds lost and out of order"
    POISON = "poison at every queue"

    @property
    def service(self) -> str | None:
        """Service of which one process is hit; None for faults of brokers, links and messages."""
        what, _, service = self.value.partition(" ")
        return service if what in ("kill", "drain", "freeze") and service.islower() else None

    @property
    def resource(self) -> str:
        """Kind of target. All resources but `process` take one fault at a time."""
        if self in (FaultKind.KILL_RABBITMQ, FaultKind.LOSE_RABBITMQ, FaultKind.MEMORY_ALARM, FaultKind.DISK_ALARM):
            return "rabbitmq"
        if self in (FaultKind.KILL_REDIS, FaultKind.LOSE_REDIS, FaultKind.FREEZE_REDIS):
            return "redis"
        if self in (FaultKind.DUPLICATES, FaultKind.LOST_ROUNDS, FaultKind.POISON):
            return "messages"
        return "link" if self in (FaultKind.CUT_LINK, FaultKind.DEAD_LINK, FaultKind.SLOW_LINK) else "process"

    @property
    def loses_data(self) -> bool:
        """True if accepted requests may end with an error, since their state is lost."""
        return self in (FaultKind.LOSE_RABBITMQ, FaultKind.LOSE_REDIS)


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule. Times are seconds."""

    number: int
    kind: FaultKind
    pick: float
    """Choice among the processes or links, as a share of their number from 0 to 1."""
    hold_s: float
    """Duration of the fault, or the time until a killed target is started again."""
    gap_s: float
    """Pause after it."""


_HOLDS: dict[str, tuple[float, float]] = {"kill": (0.0, 1.5), "drain": (0.0, 0.5), "freeze": (3.5, 6.0)}
_OTHER_HOLDS = {
    FaultKind.FREEZE_GATEWAY: (3.0, 5.0),
    FaultKind.KILL_RABBITMQ: (0.0, 3.0),
    FaultKind.KILL_REDIS: (0.0, 3.0),
    FaultKind.LOSE_RABBITMQ: (0.0, 1.0),
    FaultKind.LOSE_REDIS: (0.0, 1.0),
    FaultKind.MEMORY_ALARM: (1.0, 4.0),
    FaultKind.DISK_ALARM: (1.0, 4.0),
    FaultKind.CUT_LINK: (0.2, 4.0),
    FaultKind.DEAD_LINK: (2.0, 8.0),
    FaultKind.SLOW_LINK: (2.0, 5.0),
    FaultKind.DUPLICATES: (2.0, 5.0),
    FaultKind.LOST_ROUNDS: (2.0, 5.0),
    FaultKind.POISON: (0.0, 0.5),
}
_WEIGHTS = {
    FaultKind.KILL_VERIFIER: 3.0,
    FaultKind.KILL_DRAFTER: 2.0,
    FaultKind.KILL_GATEWAY: 2.0,
    FaultKind.FREEZE_VERIFIER: 2.0,
    FaultKind.DRAIN_VERIFIER: 2.0,
    FaultKind.CUT_LINK: 2.0,
    FaultKind.KILL_ESTIMATOR: 0.5,
    FaultKind.LOSE_RABBITMQ: 0.5,
    FaultKind.LOSE_REDIS: 0.5,
}


def schedule(
    seed: int, count: int, kinds: Sequence[FaultKind] = tuple(FaultKind), longest_gap_s: float = 2.0
) -> list[Fault]:
    """Return `count` faults: first each kind once, in random order, then kinds drawn by weight."""
    draw = random.Random(f"faults-{seed}")
    first = draw.sample(list(kinds), len(kinds))
    weights = [_WEIGHTS.get(kind, 1.0) for kind in kinds]
    drawn = [*first, *draw.choices(kinds, weights, k=max(0, count - len(first)))][:count]
    faults = []
    for number, kind in enumerate(drawn):
        shortest, longest = _OTHER_HOLDS.get(kind) or _HOLDS[kind.value.partition(" ")[0]]
        hold_s = draw.uniform(shortest, longest)
        faults.append(Fault(number, kind, draw.random(), round(hold_s, 2), round(draw.uniform(0, longest_gap_s), 2)))
    return faults
