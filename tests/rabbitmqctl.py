"""RabbitMQ's own tool, on a private server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.tools.local import servers
from services.tools.local.machine import inspect_machine
from services.tools.local.servers import BrokerServer


@asynccontextmanager
async def own_rabbitmq(folder: Path, conf: str = "") -> AsyncIterator[BrokerServer]:
    """A private RabbitMQ for one test module."""
    host = inspect_machine()
    assert host.rabbitmq is not None
    assert host.epmd is not None
    server = await servers.start_rabbitmq(host.rabbitmq, host.epmd, folder, conf)
    try:
        yield server
    finally:
        await server.stop()


async def rabbitmqctl(server: BrokerServer, *arguments: str) -> str:
    """The output of a command."""
    host = inspect_machine()
    assert host.rabbitmq is not None
    environment = _environment(server.processes[0].pid)
    child = await asyncio.create_subprocess_exec(
        str(host.rabbitmq.with_name("rabbitmqctl")),
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await child.communicate()
    assert child.returncode == 0, output.decode()
    return output.decode()


def _environment(pid: int) -> dict[str, str]:
    raw = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(line.split("=", 1) for line in raw.split("\0") if "=" in line)


async def import_definitions(server: BrokerServer, file: Path, made: dict[str, Any]) -> None:
    """As an operator does it."""
    file.write_text(json.dumps(made))  # noqa: ASYNC240 - a few kilobytes
    await rabbitmqctl(server, "import_definitions", str(file))


def url_of(server: BrokerServer, user: str, password: str) -> str:
    """The server's address for another user."""
    scheme, _, rest = server.url.partition("://")
    return f"{scheme}://{user}:{password}@{rest.rpartition('@')[2]}"
