"""RabbitMQ definitions of users, permissions, queues and policies, derived from the topology.

Each service has a user with these permissions:

    configure   its instances' own queues only: exchanges and shared queues are part of the definitions
    write       the exchange, with the keys that its role publishes; dead letters; its own queues (to bind them)
    read        the exchange, to bind the keys that its role listens to; its own queues; the shared queues it serves

Permissions on names apply to queues and exchanges alike, and topic permissions to the keys of the topic exchange.
RabbitMQ before 3.13 checks a message's own key only, not the keys in `CC`: a compromised service could reach any queue
of the exchange. An untrusted device therefore has no access to the exchange at all.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from shared.broker.topology import (
    DEFAULT_POOL,
    FRESH,
    ROLES,
    JournalLimits,
    Queue,
    Role,
    Topology,
    device_name,
    probe_key,
)

Definitions = dict[str, Any]

OWN_QUEUE_BYTES = 256 << 20
"""Size of the queue of an instance that does not read. The oldest messages are dropped, and count as lost."""
WAITING_ROUNDS = 100_000
"""Most pending rounds. The oldest are dropped, and their drafters send them again."""
DEVICE_QUEUE_BYTES = 16 << 20
"""Size of the queue of a device that does not read."""
DEVICE_LIMITS = {"max-connections": 3, "max-channels": 16}
"""Limits of a device's user. More than one connection, because RabbitMQ may notice the end of the last one late."""
NOTHING = "^$"


def user_of(topology: Topology, service: str) -> str:
    """Return the name of a service's RabbitMQ user."""
    return f"{topology.namespace}-{service}"


def definitions(
    topology: Topology,
    passwords: Mapping[str, str],
    *,
    vhost: str = "/",
    pools: Iterable[str] = (DEFAULT_POOL,),
    journal: JournalLimits | None = None,
) -> Definitions:
    """Return the definitions of one namespace, for `rabbitmqctl import_definitions`.

    passwords: of each service's user, by the user's name. pools: the pools of drafters. journal: limits of the journal,
    None without one; none of these users may read it.
    """
    made: Definitions = {"vhosts": [{"name": vhost}], "users": [], "permissions": [], "topic_permissions": []}
    for service, role in ROLES.items():
        name = user_of(topology, service)
        made["users"].append(user(name, passwords[name]))
        made["permissions"].append(_permissions(topology, service, role) | {"user": name, "vhost": vhost})
        made["topic_permissions"].append(
            _topic_permissions(topology, service, role) | {"user": name, "vhost": vhost, "exchange": topology.exchange}
        )
    generates = [topology.generate_queue(pool) for pool in dict.fromkeys(pools)]
    queues = [topology.verify_queue(), topology.sample_queue(), *generates]
    dead = topology.dead_queue()
    made["exchanges"] = [
        exchange(topology.exchange, "topic", vhost),
        exchange(topology.dead, "fanout", vhost),
    ]
    made["queues"] = [queue_definition(queue, vhost) for queue in (*queues, dead)]
    made["bindings"] = [
        binding(topology.exchange, queue.name, key, vhost) for queue in queues for key in queue.bindings
    ]
    made["bindings"].append(binding(topology.dead, dead.name, "", vhost))
    if journal is not None:
        record = topology.journal_queue(journal)
        made["exchanges"].append(exchange(record.name, "topic", vhost))
        made["queues"].append(queue_definition(record, vhost))
        made["bindings"] += [binding(topology.exchange, record.name, key, vhost) for key in record.bindings]
        made["bindings"].append(binding(record.name, record.name, "#", vhost))
    made["policies"] = _policies(topology, vhost)
    return made


def _policies(topology: Topology, vhost: str) -> list[Definitions]:
    """Return the limits of queues whose consumers may be gone."""
    own = "|".join(ROLES)
    return [
        policy(
            f"{topology.namespace}-own-queues",
            _exactly(_own(topology, f"({own})")),
            {"max-length-bytes": OWN_QUEUE_BYTES, "overflow": "drop-head"},
            vhost,
        ),
        policy(
            f"{topology.namespace}-device-queues",
            _exactly(_pattern(f"{topology.namespace}.{device_name('*')}")),
            {"max-length-bytes": DEVICE_QUEUE_BYTES, "overflow": "drop-head"},
            vhost,
        ),
        policy(
            f"{topology.namespace}-rounds",
            _exactly(_literal(topology.verify_queue().name)),
            {"max-length": WAITING_ROUNDS, "overflow": "drop-head"},
            vhost,
        ),
    ]


def device_definitions(topology: Topology, device: str, password: str, *, vhost: str = "/") -> Definitions:
    """Return the additional definitions for an untrusted device outside the cluster.

    The device may write to one exchange, which leads to one bounded queue; read its requests and results; bind its
    results and Load; and open a few connections.
    """
    name = user_of(topology, device_name(device))
    own = Topology(topology.namespace, device).drafter_queue(device_name(device))
    own_names = f"{_literal(own.name)}({FRESH}.+)?"
    requests, rounds = topology.generate_queue(device_name(device)), topology.rounds_queue(device)
    through = topology.rounds_exchange(device)
    may = {"user": name, "vhost": vhost}
    return {
        "users": [user(name, password, DEVICE_LIMITS)],
        "permissions": [
            may
            | {
                "configure": _exactly(own_names),
                "write": _exactly(own_names, _literal(through)),
                "read": _exactly(own_names, _literal(requests.name), _literal(topology.exchange)),
            }
        ],
        "topic_permissions": [
            may
            | {
                "exchange": topology.exchange,
                "write": NOTHING,
                "read": _exactly(*(_literal(key) for key in own.bindings)),
            }
        ],
        "exchanges": [exchange(through, "fanout", vhost)],
        "queues": [queue_definition(queue, vhost) for queue in (requests, rounds)],
        "bindings": [
            binding(through, rounds.name, "", vhost),
            *(binding(topology.exchange, requests.name, key, vhost) for key in requests.bindings),
        ],
    }


def joined(*parts: Definitions) -> Definitions:
    """Return several definitions merged into one."""
    made: Definitions = {}
    for part in parts:
        for kind, entries in part.items():
            made.setdefault(kind, []).extend(entries)
    return made


def _permissions(topology: Topology, service: str, role: Role) -> dict[str, str]:
    own = _own(topology, service)
    exchange_name = _literal(topology.exchange)
    served = [_pattern(topology.shared_queue(key).name) for key in role.serves]
    copies = [_literal(topology.journal)] if role.records else []
    return {
        "configure": _exactly(own),
        "write": _exactly(own, exchange_name, _literal(topology.dead), *copies),
        "read": _exactly(own, exchange_name, *served),
    }


def _topic_permissions(topology: Topology, service: str, role: Role) -> dict[str, str]:
    probes = _literal(probe_key("")) + _own(topology, service)
    return {
        "write": _exactly(probes, *map(_pattern, role.publishes)),
        "read": _exactly(probes, *map(_pattern, role.listens)),
    }


def user(name: str, password: str, limits: Mapping[str, int] | None = None) -> Definitions:
    """Return a user without administrative rights. The hash is RabbitMQ's: four bytes of salt, then SHA-256 of both.

    The salt is derived from user and password, which are long and random, so the same input gives the same file.
    """
    salt = sha256(f"{name}\n{password}".encode()).digest()[:4]
    hashed = b64encode(salt + sha256(salt + password.encode()).digest()).decode()
    return {
        "name": name,
        "password_hash": hashed,
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": [],
        "limits": dict(limits or {}),
    }


def exchange(name: str, kind: str, vhost: str) -> Definitions:
    """Return a durable exchange, as the services declare it."""
    return {
        "name": name,
        "vhost": vhost,
        "type": kind,
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {},
    }


def queue_definition(queue: Queue, vhost: str) -> Definitions:
    """Return a shared queue, as the services declare it."""
    return {
        "name": queue.name,
        "vhost": vhost,
        "durable": queue.durable,
        "auto_delete": False,
        "arguments": dict(queue.arguments),
    }


def binding(source: str, queue: str, key: str, vhost: str) -> Definitions:
    """Return a binding of a queue to an exchange."""
    return {
        "source": source,
        "vhost": vhost,
        "destination": queue,
        "destination_type": "queue",
        "routing_key": key,
        "arguments": {},
    }


def policy(name: str, pattern: str, definition: Definitions, vhost: str) -> Definitions:
    """Return a policy for queues whose names match `pattern`."""
    return {
        "vhost": vhost,
        "name": name,
        "pattern": pattern,
        "apply-to": "queues",
        "definition": definition,
        "priority": 10,
    }


def _own(topology: Topology, service: str) -> str:
    return rf"{_literal(topology.namespace)}\.{service}\..+"


def _pattern(text: str) -> str:
    """Return a regular expression for a name in which `*` stands for any name."""
    return ".+".join(_literal(part) for part in text.split("*"))


def _literal(text: str) -> str:
    return re.sub(r"([.])", r"\\\1", text)


def _exactly(*patterns: str) -> str:
    return f"^({'|'.join(patterns)})$" if patterns else NOTHING
