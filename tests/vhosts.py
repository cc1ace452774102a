"""Virtual hosts at the private RabbitMQ of a test run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import psutil
import pytest

from services.tools.local.brokers import Brokers
from services.tools.local.machine import inspect_machine


@asynccontextmanager
async def vhost(brokers: Brokers, name: str) -> AsyncIterator[str]:
    """The broker's address with a new virtual host of this name, which is deleted at the end."""
    owned = [process for server in brokers.servers for process in server.processes if process.name == "rabbitmq"]
    script = inspect_machine().rabbitmq
    if not owned or script is None:
        pytest.skip("only a private RabbitMQ can be given virtual hosts here")
    environment = psutil.Process(owned[0].pid).environ()
    parts = urlsplit(brokers.amqp_url)

    async def control(*words: str) -> None:
        command = [str(script.with_name("rabbitmqctl")), "-n", environment["RABBITMQ_NODENAME"], *words]
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()

    await control("add_vhost", name)
    try:
        await control("set_permissions", "-p", name, parts.username or "guest", ".*", ".*", ".*")
        yield urlunsplit(parts._replace(path=f"/{name}"))
    finally:
        await control("delete_vhost", name)
