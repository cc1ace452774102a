"""A stack's services start while its brokers do: they are kept, started again, or ended with the brokers."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from services.tools.local import servers
from services.tools.local.brokers import Brokers
from services.tools.local.folder import RunFolder
from services.tools.local.service_commands import ServiceCommands
from services.tools.local.stack import Stack
from shared.errors import BrokersError

SERVICE = "import json, time; print(json.dumps({'event': 'ready'}), flush=True); time.sleep(600)"
REAL, OLD = "amqp://here/", "amqp://elsewhere/"
GIVES_UP = "import sys; sys.exit(1)"


class AnnouncedBrokers(Brokers):
    """Brokers that announce an address, and answer once the services run; their last address may be another."""

    first_amqp_url = REAL
    error: BrokersError | None = None
    folders: list[Path]

    async def start(self) -> None:
        self.folders.append(self.folder)
        self._rabbitmq_at(self.first_amqp_url)
        self._redis_at("redis://here/")
        while len(list(self.folder.glob("*.log"))) < 2:  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.01)
        await self.answer()
        if self.error is not None:
            raise self.error
        self._rabbitmq_at(REAL)

    async def answer(self) -> None:
        """Let the services run for a moment."""
        await asyncio.sleep(0.2)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replace services by a program that is ready at once; return the service and broker address of each start."""
    started: list[tuple[str, str]] = []

    def command(self: ServiceCommands, service: str) -> list[str]:
        started.append((service, self.amqp_url))
        return [sys.executable, "-c", SERVICE]

    monkeypatch.setattr(ServiceCommands, "command", command)
    monkeypatch.setattr("services.tools.local.stack.RunFolder", lambda purpose: RunFolder(purpose, tmp_path / "run"))
    return started


@pytest.fixture
def announced(commands: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> type[AnnouncedBrokers]:
    class Announced(AnnouncedBrokers):
        folders: list[Path] = []  # noqa: RUF012 - of this test

    monkeypatch.setattr("services.tools.local.stack.Brokers", Announced)
    return Announced


def light() -> Stack:
    return Stack("test-start", verifiers=0, gateways=0, drafters=0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_services_load_while_the_brokers_start(
    announced: type[AnnouncedBrokers], commands: list[tuple[str, str]]
) -> None:
    async with light() as stack:
        assert [process.name for process in stack.processes()] == ["scheduler-1", "estimator-1"]
        running = [process.pid for process in stack.processes()]
    assert commands == [("scheduler", REAL), ("estimator", REAL)]
    assert not any(map(alive, running))


async def test_services_with_an_old_address_are_started_again(
    announced: type[AnnouncedBrokers], commands: list[tuple[str, str]]
) -> None:
    announced.first_amqp_url = OLD
    async with light() as stack:
        assert [process.name for process in stack.processes()] == ["scheduler-1", "estimator-1"]
    assert commands == [(service, url) for url in (OLD, REAL) for service in ("scheduler", "estimator")]


async def test_services_that_are_about_to_give_up_are_started_again(
    announced: type[AnnouncedBrokers], commands: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that waits no longer for RabbitMQ lives until its end is complete."""
    monkeypatch.setattr("services.tools.local.stack.CONNECT_TIMEOUT_S", 0.1)
    async with light() as stack:
        assert [process.name for process in stack.processes()] == ["scheduler-1", "estimator-1"]
    assert commands == [("scheduler", REAL), ("estimator", REAL)] * 2


async def test_services_that_gave_up_are_started_again(
    announced: type[AnnouncedBrokers], commands: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service ends if RabbitMQ takes longer to boot than it waits."""
    programs = iter([SERVICE, GIVES_UP, SERVICE, SERVICE])
    real = ServiceCommands.command

    def command(self: ServiceCommands, service: str) -> list[str]:
        real(self, service)
        return [sys.executable, "-c", next(programs)]

    monkeypatch.setattr(ServiceCommands, "command", command)

    stack = light()

    async def answer(self: AnnouncedBrokers) -> None:
        while [process.alive for _, process in stack._services.launched] != [True, False]:  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.01)

    monkeypatch.setattr(announced, "answer", answer)
    async with stack:
        assert [process.name for process in stack.processes()] == ["scheduler-1", "estimator-1"]
    assert [service for service, _ in commands] == ["scheduler", "estimator"] * 2


async def test_no_service_is_left_if_the_brokers_fail(
    announced: type[AnnouncedBrokers], commands: list[tuple[str, str]]
) -> None:
    announced.error = BrokersError("no room on the disk")
    with pytest.raises(BrokersError, match="no room"):
        await light().__aenter__()
    assert len(commands) == 2
    assert list(announced.folders[0].glob("*.log")) == []


def test_rabbitmq_sees_itself_without_its_plugins(tmp_path: Path) -> None:
    installed = tmp_path / "rabbitmq_server-3.10.8"
    for name in ("rabbit-3.10.8", "rabbit_common-3.10.8", "rabbitmq_management-3.10.8", "ra-2.2.0"):
        (installed / "plugins" / name).mkdir(parents=True)
    script = installed / "sbin" / "rabbitmq-server"
    script.parent.mkdir()
    script.touch()
    for _ in range(2):
        folder = servers.few_plugins(script, tmp_path / "few")
        assert folder is not None
        assert sorted(path.name for path in folder.iterdir()) == ["rabbit-3.10.8", "rabbit_common-3.10.8"]
    (installed / "plugins" / "rabbit-3.10.8").rmdir()
    assert servers.few_plugins(script, tmp_path / "other") is None
