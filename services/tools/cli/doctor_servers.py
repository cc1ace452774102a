"""Checks of servers by `wisp doctor`: RabbitMQ, Redis, and the suite that runs at them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from services.tools.cli.core.suite_snapshot import SuiteSnapshot
from services.tools.cli.findings import Finding
from services.tools.local import broker_sources
from services.tools.local.broker_check import (
    CLUSTER_ADVANCED,
    NotReady,
    check_rabbitmq,
    check_redis,
    cluster_settings,
    tested_versions,
    without_password,
)
from services.tools.local.broker_sources import BrokerSource
from services.tools.local.folder import running_suites, suites_by_api
from services.tools.local.machine import Machine, container_engine, version_in
from services.tools.local.settings import BrokerAddresses, LocalSettings
from shared.broker.connection import addresses as amqp_addresses
from shared.broker.topology import pool_in_words
from shared.errors import BrokersError, SettingsError
from shared.runtime.tls import Tls

HEARTBEATS_S = 1.2
"""Time in which every live verifier and drafter sends a heartbeat."""


async def check_brokers(addresses: BrokerAddresses, host: Machine) -> list[Finding]:
    """Check the RabbitMQ and the Redis that the next stack would use."""
    chosen = broker_sources.choose_sources(addresses, host)
    if chosen.of(BrokerSource.MISSING):
        host = Machine(**{**vars(host), "container": await container_engine()})
        chosen = broker_sources.choose_sources(addresses, host)
    rabbitmq = await _broker("RabbitMQ", chosen.rabbitmq, host, addresses.amqp_url, addresses.tls)
    redis = await _broker("Redis", chosen.redis, host, addresses.redis_url, addresses.tls)
    return [rabbitmq, redis]


async def _broker(name: str, source: BrokerSource, host: Machine, url: str | None, tls: Tls) -> Finding:
    commands = "; ".join(broker_sources.install_commands([name], host))
    match source:
        case BrokerSource.GIVEN:
            assert url is not None
            shown = without_password(url)
            try:
                version = await (check_rabbitmq(url, tls) if name == "RabbitMQ" else check_redis(url, tls))
            except NotReady as error:
                return Finding(
                    name,
                    "missing",
                    f"{shown}: {error}",
                    "start it or correct the address, or unset WISP_AMQP_URL or WISP_REDIS_URL for a private server",
                )
            finding = _versioned(name, version, f"answers at {shown}")
            if name == "RabbitMQ" and finding.state == "ok" and len(amqp_addresses(url)) > 1:
                return _with_advice_for_cluster(finding, version)
            return finding
        case BrokerSource.INSTALLED:
            binary = host.rabbitmq if name == "RabbitMQ" else host.redis
            assert binary is not None
            version = _rabbitmq_version(binary) if name == "RabbitMQ" else _redis_version(binary)
            return _versioned(name, version, "installed; each run starts a private server")
        case BrokerSource.APT:
            return Finding(name, "note", "not installed", f"the first run installs it with apt; or type: {commands}")
        case BrokerSource.CONTAINER:
            return Finding(name, "ok", f"not installed; each run starts a {host.container} container")
        case BrokerSource.MISSING:
            return Finding(name, "missing", "not installed, and neither docker nor podman answers", commands)


def _versioned(part: str, version: str, state: str) -> Finding:
    """Return the finding about a server, with a note if WISP was not tested with its version."""
    if (tested := tested_versions(version)) is None:
        return Finding(part, "ok", f"{version} (tested) {state}")
    return Finding(
        part, "note", f"{version} (not tested) {state}", f"WISP was tested with {version.split()[0]} {tested}"
    )


def _with_advice_for_cluster(finding: Finding, version: str) -> Finding:
    """Add what a cluster's nodes need in their configuration, which clients cannot read."""
    lines = " and ".join(cluster_settings(version_in(version)))
    return replace(
        finding,
        state="note",
        advice=f"{lines} in rabbitmq.conf of each node, and {CLUSTER_ADVANCED} in its advanced.config: by default a "
        "node that hangs stops requests for 60 s",
    )


def check_apis() -> Iterator[Finding]:
    """Report the suites and baselines that `wisp up` runs from this checkout."""
    for api, suite in suites_by_api().items():
        what = "a baseline" if suite is None else suite.namespace
        yield Finding("running", "ok", f"{api.url} ({what}, process {api.pid})")


async def check_fleet(addresses: BrokerAddresses) -> list[Finding]:
    """Check drafters and arithmetic of the suite in use, if there is one."""
    from services.tools.cli.suite_address import choose_suite
    from services.tools.cli.suite_observer import observed

    running = running_suites()
    if addresses.amqp_url is None and not running:
        return []
    try:
        suite = choose_suite(addresses.amqp_url, LocalSettings().namespace, running)
        seen = await observed(replace(suite, tls=addresses.tls), HEARTBEATS_S)
    except (BrokersError, SettingsError):
        return []  # no suite, or one at brokers whose address is not known here
    return [*_without_drafters(suite.namespace, seen), *_of_arithmetics(suite.namespace, seen)]


def _without_drafters(namespace: str, seen: SuiteSnapshot) -> Iterator[Finding]:
    for pool in seen.without_drafters:
        yield Finding(
            "drafters",
            "note",
            f"none in {pool_in_words(pool)} of {namespace}: schedulers decode its sessions without drafts",
            "start a drafter; running sessions move to it",
        )


def _of_arithmetics(namespace: str, seen: SuiteSnapshot) -> list[Finding]:
    if not (mixture := seen.mixture):
        return []
    parts = "; ".join(f"{', '.join(names)}: {arithmetic}" for arithmetic, names in mixture.items())
    return [
        Finding(
            "verifiers",
            "note",
            f"of different arithmetic in {namespace}: {parts}",
            "a session stays with those of one arithmetic, unless WISP_MIXED_ARITHMETIC=allow",
        )
    ]


def _rabbitmq_version(script: Path) -> str:
    return f"RabbitMQ {_dotted(version_in(str(script.resolve())))}"


def _redis_version(binary: Path) -> str:
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    name = "Valkey" if "valkey" in answer.lower() else "Redis"
    return f"{name} {_dotted(version_in(answer))}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "of unknown version"
