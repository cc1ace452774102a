"""Definitions for RabbitMQ: made from the topology, the same for the same input, without a password in them."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.tools.cli.main import app
from shared.broker import topology
from shared.broker.access import definitions, user_of
from shared.broker.topology import ROLES, JournalLimits, Topology

NAMES = Topology("one-two_3")
PASSWORDS = {user_of(NAMES, service): f"secret of {service}" for service in ROLES}


def of(kind: str, service: str) -> dict[str, str]:
    made = definitions(NAMES, PASSWORDS)
    found = [entry for entry in made[kind] if entry["user"] == user_of(NAMES, service)]
    assert len(found) == 1
    return dict(found[0])


def test_hashes_are_rabbitmqs_and_passwords_are_not_shown() -> None:
    made = definitions(NAMES, PASSWORDS)
    assert "secret of" not in json.dumps(made)
    for user in made["users"]:
        raw = b64decode(user["password_hash"])
        assert raw[4:] == sha256(raw[:4] + PASSWORDS[user["name"]].encode()).digest()
        assert user["tags"] == []


@pytest.mark.parametrize("service", ROLES)
def test_every_service_has_the_permissions_of_its_role(service: str) -> None:
    may, keys = of("permissions", service), of("topic_permissions", service)
    own = NAMES.own_queue(service, "host-1.a", ())
    for right in ("configure", "write", "read"):
        assert re.search(may[right], own.name)
    for key in ROLES[service].publishes:
        assert re.search(keys["write"], key.replace("*", "some-1"))
    for key in (*ROLES[service].listens, topology.probe_key(own.name)):
        assert re.search(keys["read"], key.replace("*", "some-1"))
    assert re.search(may["write"], NAMES.exchange)
    assert re.search(may["write"], NAMES.dead)
    for other in set(ROLES) - {service}:
        assert not re.search(may["configure"], NAMES.own_queue(other, "x", ()).name)
    assert not re.search(may["configure"], NAMES.exchange)
    assert not re.search(may["write"], "amq.default")
    assert not re.search(may["write"], "")


def test_every_shared_queue_is_there_as_the_services_declare_it() -> None:
    made = definitions(NAMES, PASSWORDS, pools=["pool", "gpu", "pool"])
    declared = {queue["name"]: queue["arguments"] for queue in made["queues"]}
    expected = [NAMES.verify_queue(), NAMES.sample_queue(), NAMES.dead_queue()]
    expected += [NAMES.generate_queue("pool"), NAMES.generate_queue("gpu")]
    assert declared == {queue.name: queue.arguments for queue in expected}
    bound = {(one["destination"], one["routing_key"]) for one in made["bindings"] if one["source"] == NAMES.exchange}
    assert bound == {(queue.name, key) for queue in expected for key in queue.bindings}


def test_roles_that_copy_write_the_journal_and_no_role_reads_it() -> None:
    record = NAMES.journal_queue(JournalLimits(10**9, 3600))
    made = definitions(NAMES, PASSWORDS, journal=JournalLimits(10**9, 3600))
    assert {"name": record.name, "arguments": record.arguments} in [
        {"name": queue["name"], "arguments": queue["arguments"]} for queue in made["queues"]
    ]
    bound = {(one["source"], one["routing_key"]) for one in made["bindings"] if one["destination"] == record.name}
    assert bound == {(NAMES.exchange, key) for key in record.bindings} | {(NAMES.journal, "#")}
    may = {entry["user"]: entry for entry in made["permissions"]}
    writers = {user for user, entry in may.items() if re.search(entry["write"], NAMES.journal)}
    assert writers == {user_of(NAMES, "gateway"), user_of(NAMES, "scheduler")}
    assert not [user for user, entry in may.items() if re.search(entry["read"], NAMES.journal)]


def test_a_service_cannot_consume_beyond_its_role() -> None:
    with pytest.raises(ValueError, match=r"role of gateway in shared\.broker\.topology does not listen to verify"):
        NAMES.own_queue("gateway", "g", (topology.LOAD, topology.VERIFY))


def test_the_command_draws_passwords_once_and_prints_the_same_again(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords.json"
    call = ["broker", "definitions", "--passwords", str(passwords), "--namespace", "n", "--pool", "pool", "--pool", "x"]
    first = CliRunner().invoke(app, call)
    assert first.exit_code == 0, first.output
    drawn = json.loads(passwords.read_text())
    assert set(drawn) == {f"n-{service}" for service in ROLES}
    assert passwords.stat().st_mode & 0o077 == 0
    assert not any(password in first.stdout for password in drawn.values())
    assert [queue["name"] for queue in json.loads(first.stdout)["queues"]][-3:-1] == ["n.generate.pool", "n.generate.x"]
    assert CliRunner().invoke(app, call).stdout == first.stdout
    passwords.write_text("[]")
    assert "expected a JSON object" in CliRunner().invoke(app, call).output
    assert CliRunner().invoke(app, [*call[:-1], "a b"]).exit_code == 1
