"""Which fault comes when: drawn from a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What can go wrong."""

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
        """The service that one process of is hit; None for faults of something else."""
        what, _, service = self.value.partition(" ")
        return service if what in ("kill", "drain", "freeze") and service.islower() else None

    @property
    def hits(self) -> str:
        """What two faults at once must not both be done to."""
        if self in (Kind.KILL_RABBITMQ, Kind.LOSE_RABBITMQ, Kind.MEMORY_ALARM, Kind.DISK_ALARM):
            return "rabbitmq"
        if self in (Kind.KILL_REDIS, Kind.LOSE_REDIS, Kind.FREEZE_REDIS):
            return "redis"
        if self in (Kind.DUPLICATES, Kind.LOST_ROUNDS, Kind.POISON):
            return "messages"
        return "link" if self in (Kind.CUT_LINK, Kind.DEAD_LINK, Kind.SLOW_LINK) else "process"

    @property
    def loses_data(self) -> bool:
        """Whether an accepted request may end in an error after it, for what it was is gone."""
        return self in (Kind.LOSE_RABBITMQ, Kind.LOSE_REDIS)


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule. Times are seconds."""

    number: int
    kind: Kind
    pick: float
    """Which of the processes or links it hits: a share of their number, from 0 to 1."""
    hold_s: float
    """How long it lasts, or how long what it ended stays away."""
    gap_s: float
    """Pause after it."""


_HOLDS: dict[str, tuple[float, float]] = {"kill": (0.0, 1.5), "drain": (0.0, 0.5), "freeze": (3.5, 6.0)}
_OTHER_HOLDS = {
    Kind.FREEZE_GATEWAY: (3.0, 5.0),
    Kind.KILL_RABBITMQ: (0.0, 3.0),
    Kind.KILL_REDIS: (0.0, 3.0),
    Kind.LOSE_RABBITMQ: (0.0, 1.0),
    Kind.LOSE_REDIS: (0.0, 1.0),
    Kind.MEMORY_ALARM: (1.0, 4.0),
    Kind.DISK_ALARM: (1.0, 4.0),
    Kind.CUT_LINK: (0.2, 4.0),
    Kind.DEAD_LINK: (2.0, 8.0),
    Kind.SLOW_LINK: (2.0, 5.0),
    Kind.DUPLICATES: (2.0, 5.0),
    Kind.LOST_ROUNDS: (2.0, 5.0),
    Kind.POISON: (0.0, 0.5),
}
_WEIGHTS = {
    Kind.KILL_VERIFIER: 3.0,
    Kind.KILL_DRAFTER: 2.0,
    Kind.KILL_GATEWAY: 2.0,
    Kind.FREEZE_VERIFIER: 2.0,
    Kind.DRAIN_VERIFIER: 2.0,
    Kind.CUT_LINK: 2.0,
    Kind.KILL_ESTIMATOR: 0.5,
    Kind.LOSE_RABBITMQ: 0.5,
    Kind.LOSE_REDIS: 0.5,
}


def schedule(seed: int, count: int, kinds: Sequence[Kind] = tuple(Kind), longest_gap_s: float = 2.0) -> list[Fault]:
    """`count` faults: each kind once in a drawn order as far as they reach, then drawn by weight."""
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
