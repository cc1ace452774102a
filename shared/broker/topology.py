"""Names at RabbitMQ: one topic exchange, its routing keys, and the queues bound to it.

    routing key             from → to                             queue
    generate.<pool>         gateway → one drafter of the pool     <ns>.generate.<pool>      durable, quorum
                            Schedulers consume it too, with a lower priority, for requests without a drafter
    verify                  drafter → the active scheduler        <ns>.verify               durable, one active consumer
    batch.<verifier>        scheduler → that verifier             <ns>.verifier.<name>      exclusive
                            Release: sessions whose KV the verifier drops
    result.<instance>       verifier → drafter, gateway (by CC)   <ns>.drafter.<name> ...   exclusive
                            verifier → drafter: HiddenStates, just before the Result of their round
    result.scheduler        verifier → every scheduler (by CC)    <ns>.scheduler.<name>     exclusive
    sample                  verifier → the active estimator       <ns>.sample               durable, bounded
    costmodel.<verifier>    estimator → schedulers, gateways
    load                    scheduler → drafters, gateways
    heartbeat.<verifier>    verifier → schedulers
    drafter.<drafter>       drafter → schedulers, observers       not in the journal
    cancel                  gateway → drafters, schedulers, verifiers
    ended                   gateway → observers (`wisp top`, the fleet view of gateways)
    generate.device.<name>  gateway → that device                 <ns>.generate.device.<name>
    result.device.<name>    verifier → that device                <ns>.device.<name>        exclusive, bounded
    probe.<queue>           an instance → itself: checks that its consumer is alive

`ROLES` lists which keys each service publishes and receives; its RabbitMQ user has exactly these permissions
(`shared.broker.access`).

A device outside the cluster sends its rounds through a fanout exchange of its own, `<ns>.uplink.<name>`, to the queue
`<ns>.rounds.<name>`, which the scheduler consumes: the queue identifies the device.

Messages that cannot be decoded go to the fanout exchange `<ns>.dead` and its queue of the same name, with the reason.

With the journal on, the stream queue `<ns>.journal` takes a copy of everything but samples and hidden states. It is
bound beside the work queues, except for messages whose sender must learn that the receiver is missing (Generate,
Batch): a binding of the journal would count as a receiver. Their copies go to the topic exchange `<ns>.journal`.
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
FRESH = ":"
"""Between the plain name of an own queue and what makes it new after a reconnect."""
DEFAULT_POOL = "pool"

GENERATE_DELIVERY_LIMIT = 20
"""A Generate delivered this often without an acknowledgement, as when it crashes drafters, is dead-lettered."""
DEAD_LETTERS_KEPT = 10_000
SAMPLES_KEPT = 10_000
ROUNDS_KEPT = 256
"""Most pending rounds of one device. The oldest are dropped, and the device sends them again."""
ROUND_BYTES = 65_536
"""Longest message of a device."""
JOURNAL_SEGMENTS = 20
"""Files of a full journal. RabbitMQ drops whole files only."""
SMALLEST_SEGMENT = 1_000_000
"""Bytes."""


def pool_in_words(pool: str) -> str:
    """Return a drafter pool's name for people."""
    return "default pool" if pool == DEFAULT_POOL else f"pool {pool}"


def generate(pool: str = DEFAULT_POOL) -> str:
    """Return the routing key of requests for a drafter pool or a device."""
    return f"generate.{pool}"


def batch(verifier_id: str) -> str:
    """Return the routing key of batches for a verifier."""
    return f"batch.{verifier_id}"


def result(instance: str) -> str:
    """Return the routing key of results for a drafter or a gateway."""
    return f"result.{instance}"


def costmodel(verifier_id: str) -> str:
    """Return the routing key of a verifier's cost model."""
    return f"costmodel.{verifier_id}"


def heartbeat(verifier_id: str) -> str:
    """Return the routing key of a verifier's heartbeats."""
    return f"heartbeat.{verifier_id}"


def drafter(name: str) -> str:
    """Return the routing key of a drafter's heartbeats: of two words, which `drafter.*` matches, whatever the name."""
    return f"drafter.{name.replace('.', ':')}"


def probe_key(queue: str) -> str:
    """Return the routing key of probes of an own queue's consumer."""
    return f"probe.{queue}"


def device_name(device: str) -> str:
    """Return a device's name as a drafter and as a pool. Its dot keeps it apart from names of pools and services."""
    return f"device.{device}"


def rounds(device: str) -> str:
    """Return the name of a device's rounds in roles. They go through an exchange of the device's own."""
    return f"rounds.{device}"


@dataclass(frozen=True)
class Role:
    """Routing keys of a service. Keys are patterns: `*` stands for a name."""

    publishes: tuple[str, ...] = ()
    listens: tuple[str, ...] = ()
    """Keys bound to the instances' own queues."""
    serves: tuple[str, ...] = ()
    """Keys whose shared queues the service consumes."""
    records: bool = False
    """True if the service publishes copies of its confirmed messages to the journal."""


FLEET = (LOAD, heartbeat("*"), costmodel("*"), RESULT_SCHEDULER, ENDED, drafter("*"))
"""Keys of the gateway's fleet view, bound while somebody looks. Batches are not among them: their senders must learn
that a receiver is missing."""

ROLES = {
    "gateway": Role(publishes=(generate("*"), CANCEL, ENDED), listens=(result("*"), *FLEET), records=True),
    "drafter": Role(publishes=(VERIFY, drafter("*")), listens=(result("*"), CANCEL, LOAD), serves=(generate("*"),)),
    # A scheduler also serves requests for which no drafter has room.
    "scheduler": Role(
        publishes=(batch("*"), LOAD, VERIFY, drafter("*")),
        listens=(RESULT_SCHEDULER, heartbeat("*"), costmodel("*"), CANCEL, LOAD, drafter("*")),
        serves=(VERIFY, rounds("*"), generate("*")),
        records=True,
    ),
    "estimator": Role(publishes=(costmodel("*"),), serves=(SAMPLE,)),
    "verifier": Role(publishes=(result("*"), heartbeat("*"), SAMPLE, costmodel("*")), listens=(batch("*"), CANCEL)),
    "top": Role(listens=(LOAD, heartbeat("*"), costmodel("*"), batch("*"), RESULT_SCHEDULER, ENDED, drafter("*"))),
}


@dataclass(frozen=True)
class JournalLimits:
    """Largest size and age of the journal."""

    max_bytes: int
    max_age_s: int


@dataclass(frozen=True)
class Queue:
    """Declaration of a queue, and its bindings."""

    name: str
    bindings: tuple[str, ...]
    durable: bool = False
    exclusive: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Topology:
    """Names within one namespace, as seen by a service or, if `device` is set, by that device."""

    namespace: str = "wisp"
    device: str = ""
    replicated: bool = False
    """True if all shared queues are quorum queues, which outlive the loss of a node of the cluster."""

    @property
    def _kind(self) -> dict[str, Any]:
        return {"x-queue-type": "quorum"} if self.replicated else {}

    @property
    def exchange(self) -> str:
        """The topic exchange for all messages."""
        return self.namespace

    @property
    def dead(self) -> str:
        """The fanout exchange and the queue of dead letters."""
        return f"{self.namespace}.dead"

    def dead_queue(self) -> Queue:
        """Return the queue of dead letters, which keeps the latest ones up to a limit."""
        return Queue(self.dead, (), durable=True, arguments=self._kind | {"x-max-length": DEAD_LETTERS_KEPT})

    def generate_queue(self, pool: str = DEFAULT_POOL) -> Queue:
        """Return the queue of requests for a pool of drafters. Each is acknowledged when its session has ended."""
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
        """Return the shared queue of a key in `Role.serves`."""
        if key == VERIFY:
            return self.verify_queue()
        if key == SAMPLE:
            return self.sample_queue()
        if key.startswith(rounds("")):
            return self.rounds_queue(key.removeprefix(rounds("")))
        return self.generate_queue(key.removeprefix(generate("")))

    def rounds_exchange(self, device: str) -> str:
        """Return the fanout exchange for the rounds of a device, and nothing else.

        It has another name than the queue behind it, because RabbitMQ's permissions do not distinguish exchanges from
        queues.
        """
        return f"{self.namespace}.uplink.{device}"

    def rounds_queue(self, device: str) -> Queue:
        """Return the queue of a device's rounds. It is bounded, so that a flood harms only the device itself."""
        return Queue(
            f"{self.namespace}.rounds.{device}",
            (),
            durable=True,
            arguments=self._kind
            | {
                "x-single-active-consumer": True,
                "x-max-length": ROUNDS_KEPT,
                "x-max-length-bytes": ROUND_BYTES * 4,
                "x-overflow": "drop-head",
            },
        )

    def drafter_queue(self, instance: str) -> Queue:
        """Return a drafter's queue for everything but requests. A device gets no Cancel of others' sessions."""
        if self.device:
            name = f"{self.namespace}.{device_name(self.device)}"
            return Queue(name, (result(instance), LOAD), exclusive=True)
        return self.own_queue("drafter", instance, (result(instance), CANCEL, LOAD))

    def verify_queue(self) -> Queue:
        """Return the queue of rounds. One scheduler consumes at a time; RabbitMQ switches to a standby."""
        arguments = self._kind | {"x-single-active-consumer": True}
        return Queue(f"{self.namespace}.verify", (VERIFY,), durable=True, arguments=arguments)

    def sample_queue(self) -> Queue:
        """Return the queue of measured batches for the estimator. When full, it drops the oldest."""
        return Queue(
            f"{self.namespace}.sample",
            (SAMPLE,),
            durable=True,
            arguments=self._kind | {"x-single-active-consumer": True, "x-max-length": SAMPLES_KEPT},
        )

    @property
    def journal(self) -> str:
        """The stream queue of recorded messages, and the topic exchange of the copies that senders publish."""
        return f"{self.namespace}.journal"

    def journal_queue(self, limits: JournalLimits) -> Queue:
        """Return the journal's queue with its bindings to the topic exchange."""
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
        """Return an instance's own queue, which lives as long as the instance's connection.

        Raises ValueError for a binding outside the service's role, which its user could not make.
        """
        role = ROLES.get(service)
        if role is not None and (
            strays := [key for key in bindings if not any(fnmatchcase(key, pattern) for pattern in role.listens)]
        ):
            raise ValueError(f"the role of {service} in shared.broker.topology does not listen to {', '.join(strays)}")
        name = f"{self.namespace}.{service}.{instance}"
        return Queue(name, (*bindings, probe_key(name)), exclusive=True)
