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

What cannot be decoded goes to the fanout exchange `<ns>.dead` and its queue of the same name, with the reason.

With the journal on, the stream queue `<ns>.journal` takes a copy of everything but samples and hidden states. It is
bound beside the work queues, except for messages whose sender has to know that their receiver is there (Generate,
Batch): a binding of the journal's would count as a receiver. Their copies go to the topic exchange `<ns>.journal`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """Every name within one namespace."""

    namespace: str = "wisp"

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
        """An instance's own queue: it lives as long as the instance's connection."""
        return Queue(f"{self.namespace}.{service}.{instance}", bindings, exclusive=True)
