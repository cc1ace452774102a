"""Decides where RabbitMQ and Redis come from, and which commands install them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from services.tools.local.machine import Machine
from services.tools.local.settings import BrokerAddresses
from shared.errors import BrokersError

APT_PACKAGES = {"RabbitMQ": "rabbitmq-server", "Redis": "redis-server"}


class BrokerSource(StrEnum):
    """The source of one broker, in the order of preference."""

    GIVEN = "given"
    INSTALLED = "installed"
    APT = "apt"
    CONTAINER = "container"
    MISSING = "missing"


@dataclass(frozen=True)
class BrokerSources:
    """The sources of both brokers."""

    rabbitmq: BrokerSource
    redis: BrokerSource

    def of(self, source: BrokerSource) -> list[str]:
        """Return the names of the brokers that come from `source`."""
        return [name for name, where in (("RabbitMQ", self.rabbitmq), ("Redis", self.redis)) if where is source]


def choose_sources(addresses: BrokerAddresses, host: Machine) -> BrokerSources:
    """Prefer given addresses, then installed programs, then apt (as root on Debian), then containers."""

    def source(given: str | None, installed: bool) -> BrokerSource:
        if given:
            return BrokerSource.GIVEN
        if installed:
            return BrokerSource.INSTALLED
        if host.root and host.debian and host.apt:
            return BrokerSource.APT
        return BrokerSource.CONTAINER if host.container else BrokerSource.MISSING

    return BrokerSources(
        source(addresses.amqp_url, host.rabbitmq_installed), source(addresses.redis_url, host.redis is not None)
    )


def install_commands(names: list[str], host: Machine) -> list[str]:
    """Return the commands that install the named brokers on this machine."""
    sudo = "" if host.root else "sudo "
    packages = " ".join(APT_PACKAGES[name] for name in names)
    if host.debian:
        return [
            f"{sudo}apt-get update",
            f"{sudo}apt-get install -y --no-install-recommends {packages}",
        ]
    if host.distribution == "macos":
        return [f"brew install {packages.replace('-server', '')}"]
    families = set(host.distribution.split())
    if families & {"fedora", "rhel", "centos"}:
        return [f"{sudo}dnf install -y {packages.replace('redis-server', 'redis')}"]
    if "arch" in families:
        return [f"{sudo}pacman -S {packages.replace('rabbitmq-server', 'rabbitmq').replace('redis-server', 'redis')}"]
    if families & {"suse", "opensuse"}:
        return [f"{sudo}zypper install {packages.replace('redis-server', 'redis')}"]
    return [f"install {' and '.join(names)} with the package tool of this system"]


def missing_brokers(names: list[str], host: Machine) -> BrokersError:
    """Return the error for brokers without a source, with the commands to type."""
    steps = "\n".join(f"    {line}" for line in install_commands(names, host))
    settings = " and ".join({"RabbitMQ": "WISP_AMQP_URL", "Redis": "WISP_REDIS_URL"}[name] for name in names)
    return BrokersError(
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not installed, and neither docker nor podman "
        f"answers here.\nInstall with:\n{steps}\nor set {settings} to {'a server' if len(names) == 1 else 'servers'} "
        "that you run. Then try again."
    )
