"""Sources of brokers: the order of preference, and the error without any."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from services.tools.local import apt
from services.tools.local.apt import progress_line
from services.tools.local.broker_sources import BrokerSource, BrokerSources, choose_sources, missing_brokers
from services.tools.local.containers import RABBITMQ_IMAGE, run_command
from services.tools.local.machine import Machine, inspect_machine, version_in
from services.tools.local.settings import BrokerAddresses

BARE = Machine(rabbitmq=None, epmd=None, redis=None, distribution="debian", root=False, apt=True, container=None)
INSTALLED = replace(BARE, rabbitmq=Path("/x/rabbitmq-server"), epmd=Path("/x/epmd"), redis=Path("/x/redis-server"))
NONE = BrokerAddresses(amqp_url=None, redis_url=None)


def test_given_addresses_win_over_installed_programs() -> None:
    given = BrokerAddresses(amqp_url="amqp://there/", redis_url="redis://there/")
    assert choose_sources(given, INSTALLED) == BrokerSources(BrokerSource.GIVEN, BrokerSource.GIVEN)


def test_either_address_may_be_given_alone() -> None:
    assert choose_sources(BrokerAddresses(amqp_url="amqp://there/", redis_url=None), INSTALLED) == BrokerSources(
        BrokerSource.GIVEN, BrokerSource.INSTALLED
    )
    assert choose_sources(BrokerAddresses(amqp_url=None, redis_url="redis://there/"), BARE) == BrokerSources(
        BrokerSource.MISSING, BrokerSource.GIVEN
    )


def test_addresses_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_AMQP_URL", "amqp://there/")
    monkeypatch.delenv("WISP_REDIS_URL", raising=False)
    assert BrokerAddresses() == BrokerAddresses(amqp_url="amqp://there/", redis_url=None)


def test_installed_programs_are_used_even_by_root() -> None:
    assert choose_sources(NONE, replace(INSTALLED, root=True)) == BrokerSources(
        BrokerSource.INSTALLED, BrokerSource.INSTALLED
    )


@pytest.mark.parametrize("distribution", ["debian", "ubuntu debian", "linuxmint ubuntu debian"])
def test_root_on_debian_installs_what_is_missing(distribution: str) -> None:
    host = replace(INSTALLED, epmd=None, root=True, distribution=distribution, container="docker")
    assert choose_sources(NONE, host) == BrokerSources(BrokerSource.APT, BrokerSource.INSTALLED)


@pytest.mark.parametrize(
    "host", [replace(BARE, container="podman"), replace(BARE, root=True, distribution="fedora", container="podman")]
)
def test_containers_come_after_apt(host: Machine) -> None:
    assert choose_sources(NONE, host) == BrokerSources(BrokerSource.CONTAINER, BrokerSource.CONTAINER)


def test_with_nothing_the_message_names_the_commands_to_type() -> None:
    assert choose_sources(NONE, BARE) == BrokerSources(BrokerSource.MISSING, BrokerSource.MISSING)
    text = str(missing_brokers(["RabbitMQ", "Redis"], BARE))
    assert "    sudo apt-get install -y --no-install-recommends rabbitmq-server redis-server\n" in text
    assert "WISP_AMQP_URL and WISP_REDIS_URL" in text


@pytest.mark.parametrize(
    ("distribution", "root", "command"),
    [
        ("debian", True, "    apt-get install -y --no-install-recommends redis-server\n"),
        ("fedora", False, "    sudo dnf install -y redis\n"),
        ("macos", False, "    brew install redis\n"),
        ("arch", True, "    pacman -S redis\n"),
    ],
)
def test_the_commands_fit_the_system(distribution: str, root: bool, command: str) -> None:
    text = str(missing_brokers(["Redis"], replace(BARE, distribution=distribution, root=root)))
    assert command in text
    assert "WISP_AMQP_URL" not in text


def test_the_newest_rabbitmq_is_found(tmp_path: Path) -> None:
    for version in ("3.9.30", "3.10.8", "3.2.1"):
        script = tmp_path / f"usr/lib/rabbitmq/lib/rabbitmq_server-{version}/sbin/rabbitmq-server"
        script.parent.mkdir(parents=True)
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Ubuntu"\nID=ubuntu\nID_LIKE="debian"\n')
    host = inspect_machine(search_path="", root=tmp_path)
    assert host.rabbitmq is not None
    assert "rabbitmq_server-3.10.8" in str(host.rabbitmq)
    assert host.debian
    assert (host.epmd, host.redis, host.apt) == (None, None, False)
    assert not host.rabbitmq_installed


def test_a_wrapper_that_changes_the_user_is_not_taken_for_the_server(tmp_path: Path) -> None:
    wrapper = tmp_path / "rabbitmq-server"
    wrapper.write_text("#!/bin/sh\nsu rabbitmq -s /bin/sh -c real\n")
    wrapper.chmod(0o755)
    assert inspect_machine(search_path=str(tmp_path), root=tmp_path).rabbitmq is None
    wrapper.write_text("#!/bin/sh\nexec real\n")
    assert inspect_machine(search_path=str(tmp_path), root=tmp_path).rabbitmq == wrapper


def test_versions_compare_as_numbers() -> None:
    assert version_in("/lib/rabbitmq_server-3.10.8/sbin") > version_in("/lib/rabbitmq_server-3.9.30/sbin")
    assert version_in("no number") == ()


def test_apt_status_lines_are_shown_as_percentages() -> None:
    assert progress_line("pmstatus:erlang-base:37.0370:Unpacking erlang-base (amd64)") == (
        "37 % Unpacking erlang-base (amd64)"
    )
    assert progress_line("Reading package lists...") is None
    assert progress_line("pmstatus:x:not a number:y") is None


def test_a_container_listens_on_loopback_and_hides_its_password() -> None:
    command = run_command(
        "podman", RABBITMQ_IMAGE, "127.0.0.1:4000:5672", ["rabbitmq-server"], ["RABBITMQ_DEFAULT_PASS"]
    )
    assert command[command.index("--publish") + 1] == "127.0.0.1:4000:5672"
    assert command[command.index("--env") + 1] == "RABBITMQ_DEFAULT_PASS"
    assert "--rm" in command
    assert command[-1] == "rabbitmq-server"


def test_packages_start_no_services_while_the_installer_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(apt, "POLICY", policy)

    def verdict(unit: str) -> int:
        return subprocess.run(["sh", policy, unit, "start"], check=False).returncode

    with apt._no_service_starts():
        assert [verdict(unit) for unit in ("rabbitmq-server", "redis-server", "epmd.socket", "ssh")] == [
            101,
            101,
            101,
            0,
        ]
        policy.write_text(policy.read_text().replace(f"kill -0 {os.getpid()} ", "false "))
        assert verdict("rabbitmq-server") == 0
    assert not policy.exists()


def test_the_machines_own_policy_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy-rc.d"
    policy.write_text("own")
    monkeypatch.setattr(apt, "POLICY", policy)
    with apt._no_service_starts():
        assert policy.read_text() == "own"
    assert policy.read_text() == "own"
