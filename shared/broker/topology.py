"""The names of everything at the broker: one topic exchange, its routing keys, and the queues bound to it.

    routing key             from → to                             queue
    generate.<pool>         gateway → one drafter of the pool     <ns>.generate.<pool>      durable, quorum
    verify                  drafter → the active scheduler        <ns>.verify               durable, one active consumer
    batch.<verifier>        scheduler → that verifier             <ns>.verifier.<name>      exclusive
                            Release: K/V that this verifier need not keep
    result.<instance>       verifier → drafter, gateway (by CC)   <ns>.drafter.<name> ...   exclusive
                            verifier → drafter: HiddenStates, just before the Result of their round
    result.scheduler        verifier → every scheduler (by CC)    <ns>.scheduler.<name>     exclusive
    sample                  verifier → the active estimator       <ns>.sample               durable, bounded
    costmodel.<verifier>    estimator → schedulers, gateways
    load                    scheduler → drafters, gateways
    heartbeat.<verifier>    verifier → schedulers
    cancel                  gateway → drafters, schedulers, verifiers
    ended                   gateway → who observes (`wisp top`)
    generate.device.<name>  gateway → that device                 <ns>.generate.device.<name>
    result.device.<name>    verifier → that device                <ns>.device.<name>        exclusive, bounded
    probe.<queue>           an instance → itself: shows that its consumer lives

`ROLES` says who publishes and receives what; users at the broker are given just that (`shared.broker.access`).

A device outside the cluster sends its rounds through a fanout exchange of its own, `<ns>.uplink.<name>`, to the queue
`<ns>.rounds.<name>`, which the scheduler reads: by that it knows whose they are.

What cannot be decoded goes to the fanout exchange `<ns>.dead` and its queue of the same name, with the reason.

With the journal on, the stream queue `<ns>.journal` takes a copy of everything but samples and hidden states. It is
bound beside the work queues, except for messages whose sender has to know that their receiver is there (Generate,
Batch): a binding of the journal's would count as a receiver. Their copies go to the topic exchange `<ns>.journal`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

VERIFY = "verify"
SAMPLE = "sample"
LOAD = "load"
CANCEL = "cancel"
ENDED = "ended"
RESULT_SCHEDULER = "result.scheduler"
DEFAULT_POOL = "pool"

GENERATE_DELIVERY_LIMIT = 20
"""A Generate that has brought down this many drafters is dead-lettered instead of being tried again."""
DEAD_LETTERS_KEPT = 10_000
SAMPLES_KEPT = 10_000
ROUNDS_KEPT = 256
"""Rounds of one device that may wait. The oldest go first: the device sends them again."""
ROUND_BYTES = 65_536
"""Longest message of a device."""
JOURNAL_SEGMENTS = 20
"""Files that a full journal consists of: the broker only ever drops a whole one."""
SMALLEST_SEGMENT = 1_000_000
"""Bytes."""


def generate(pool: str = DEFAULT_POOL) -> str:
    """Routing key of a request for a drafter pool, or for one named device."""
    return f"generate.{pool}"


def batch(verifier: str) -> str:
    """Routing key of a batch."""
    return f"batch.{verifier}"


def result(instance: str) -> str:
    """Routing key of a result for a drafter or a gateway."""
    return f"result.{instance}"


def costmodel(verifier: str) -> str:
    """Routing key of a verifier's cost model."""
    return f"costmodel.{verifier}"


def heartbeat(verifier: str) -> str:
    """Routing key of a verifier's heartbeat."""
    return f"heartbeat.{verifier}"


def probe_key(queue: str) -> str:
    """Routing key of a probe of an own queue's consumer."""
    return f"probe.{queue}"


def device_name(device: str) -> str:
    """A device's name as a drafter and as a pool. It has a dot, so that no pool and no service can be called that."""
    return f"device.{device}"


def rounds(device: str) -> str:
    """What a device's rounds are called in roles; they travel by an exchange of the device's own."""
    return f"rounds.{device}"


@dataclass(frozen=True)
class Role:
    """What a service does at the broker. Keys are patterns: `*` stands for a name."""

    publishes: tuple[str, ...] = ()
    listens: tuple[str, ...] = ()
    """What is bound to the instances' own queues."""
    serves: tuple[str, ...] = ()
    """Keys whose shared queues it consumes."""
    records: bool = False
    """Whether it makes copies for the journal: of what it publishes for one receiver."""


ROLES = {
    "gateway": Role(publishes=(generate("*"), CANCEL, ENDED), listens=(result("*"), LOAD), records=True),
    "drafter": Role(publishes=(VERIFY,), listens=(result("*"), CANCEL, LOAD), serves=(generate("*"),)),
    "scheduler": Role(
        publishes=(batch("*"), LOAD),
        listens=(RESULT_SCHEDULER, heartbeat("*"), costmodel("*"), CANCEL),
        serves=(VERIFY, rounds("*")),
        records=True,
    ),
    "estimator": Role(publishes=(costmodel("*"),), serves=(SAMPLE,)),
    "verifier": Role(publishes=(result("*"), heartbeat("*"), SAMPLE, costmodel("*")), listens=(batch("*"), CANCEL)),
    "top": Role(listens=(LOAD, heartbeat("*"), costmodel("*"), batch("*"), RESULT_SCHEDULER, ENDED)),
}


@dataclass(frozen=True)
class JournalLimits:
    """How much of the past the journal keeps at most."""

    max_bytes: int
    max_age_s: int


@dataclass(frozen=True)
class Queue:
    """How a queue is declared, and what is bound to it."""

    name: str
    bindings: tuple[str, ...]
    durable: bool = False
    exclusive: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Topology:
    """Every name within one namespace, as seen by a service or, if one is named, by a device."""

    namespace: str = "wisp"
    device: str = ""

    @property
    def exchange(self) -> str:
        """The topic exchange that carries every message."""
        return self.namespace

    @property
    def dead(self) -> str:
        """The fanout exchange and the queue of messages that could not be handled."""
        return f"{self.namespace}.dead"

    def dead_queue(self) -> Queue:
        """Where dead letters are kept: the latest ones, up to a limit."""
        return Queue(self.dead, (), durable=True, arguments={"x-max-length": DEAD_LETTERS_KEPT})

    def generate_queue(self, pool: str = DEFAULT_POOL) -> Queue:
        """Requests for a pool of drafters; each is acknowledged when its session has ended."""
        return Queue(
            f"{self.namespace}.generate.{pool}",
            (generate(pool),),
            durable=True,
            arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": GENERATE_DELIVERY_LIMIT,
                "x-dead-letter-exchange": self.dead,
            },
        )

    def shared_queue(self, key: str) -> Queue:
        """The shared queue of a key that a role serves."""
        if key == VERIFY:
            return self.verify_queue()
        if key == SAMPLE:
            return self.sample_queue()
        if key.startswith(rounds("")):
            return self.rounds_queue(key.removeprefix(rounds("")))
        return self.generate_queue(key.removeprefix(generate("")))

    def rounds_exchange(self, device: str) -> str:
        """The fanout exchange that a device's rounds go through, and nothing else.

        Not called like the queue behind it: RabbitMQ's permissions do not tell exchanges and queues apart.
        """
        return f"{self.namespace}.uplink.{device}"

    def rounds_queue(self, device: str) -> Queue:
        """A device's rounds for the scheduler: bounded, so that a flood drowns nobody but the device itself."""
        return Queue(
            f"{self.namespace}.rounds.{device}",
            (),
            durable=True,
            arguments={
                "x-single-active-consumer": True,
                "x-max-length": ROUNDS_KEPT,
                "x-max-length-bytes": ROUND_BYTES * 4,
                "x-overflow": "drop-head",
            },
        )

    def drafter_queue(self, instance: str) -> Queue:
        """What a drafter receives beside its requests. A device is not told which sessions of others are cancelled."""
        if self.device:
            name = f"{self.namespace}.{device_name(self.device)}"
            return Queue(name, (result(instance), LOAD), exclusive=True)
        return self.own_queue("drafter", instance, (result(instance), CANCEL, LOAD))

    def verify_queue(self) -> Queue:
        """Rounds for the scheduler. One scheduler consumes at a time; the broker hands over to a standby."""
        return Queue(f"{self.namespace}.verify", (VERIFY,), durable=True, arguments={"x-single-active-consumer": True})

    def sample_queue(self) -> Queue:
        """Measured batches for the estimator; the oldest are dropped when nobody reads them."""
        return Queue(
            f"{self.namespace}.sample",
            (SAMPLE,),
            durable=True,
            arguments={"x-single-active-consumer": True, "x-max-length": SAMPLES_KEPT},
        )

    @property
    def journal(self) -> str:
        """The stream queue that records, and the topic exchange of the copies that senders make for it."""
        return f"{self.namespace}.journal"

    def journal_queue(self, limits: JournalLimits) -> Queue:
        """The journal, bound to the work exchange. Messages that nobody but their receiver sees are not in it."""
        return Queue(
            self.journal,
            (VERIFY, RESULT_SCHEDULER, costmodel("#"), LOAD, heartbeat("#"), CANCEL, ENDED),
            durable=True,
            arguments={
                "x-queue-type": "stream",
                "x-max-length-bytes": limits.max_bytes,
                "x-max-age": f"{limits.max_age_s}s",
                "x-stream-max-segment-size-bytes": max(SMALLEST_SEGMENT, limits.max_bytes // JOURNAL_SEGMENTS),
            },
        )

    def own_queue(self, service: str, instance: str, bindings: tuple[str, ...]) -> Queue:
        """An instance's own queue: it lives as long as the instance's connection.

        Raises ValueError for a binding that is not in the service's role: its user could not make it.
        """
        role = ROLES.get(service)
        if role is not None and (
            strays := [key for key in bindings if not any(fnmatchcase(key, pattern) for pattern in role.listens)]
        ):
            raise ValueError(f"the role of {service} in shared.broker.topology does not listen to {', '.join(strays)}")
        name = f"{self.namespace}.{service}.{instance}"
        return Queue(name, (*bindings, probe_key(name)), exclusive=True)
