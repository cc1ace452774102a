"""RabbitMQ and Redis in containers, for machines with docker or podman but without the programs.

A container stays attached to a client process and ends when its standard input closes. This happens when the client or
its owner dies, so no container is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from secrets import token_hex, token_urlsafe

from services.tools.local.broker_check import check_rabbitmq, check_redis
from services.tools.local.ports import LOOPBACK, free_ports
from services.tools.local.process import Process
from services.tools.local.progress import ProgressStep
from services.tools.local.servers import BrokerServer, kill, until_ready, with_fresh_ports
from shared.errors import BrokersError

RABBITMQ_IMAGE = "docker.io/library/rabbitmq:4.3"
REDIS_IMAGE = "docker.io/library/redis:8.0"
START_S = 120.0
USER = "wisp"

# The server runs beside a watcher of standard input. The end of either stops the server and the container.
UNTIL_INPUT_CLOSES = (
    'exec 3<&0; docker-entrypoint.sh "$@" </dev/null 3<&- & server=$!; trap "kill $server" TERM; '
    "(cat <&3 >/dev/null; kill $server) & wait $server; wait $server"
)


async def start_rabbitmq(engine: str, folder: Path, step: ProgressStep) -> BrokerServer:
    """Run RabbitMQ in a container; return when a client can log in. Raises BrokersError."""
    await _pull(engine, RABBITMQ_IMAGE, folder / "pull-rabbitmq.log", step)
    password = token_urlsafe(12)
    login = {"RABBITMQ_DEFAULT_USER": USER, "RABBITMQ_DEFAULT_PASS": password}

    async def start(attempt: int) -> BrokerServer:
        (port,) = free_ports(1)
        url = f"amqp://{USER}:{password}@{LOOPBACK}:{port}/"
        log = folder / f"rabbitmq-container-{attempt}.log"
        command = run_command(engine, RABBITMQ_IMAGE, f"{LOOPBACK}:{port}:5672", ["rabbitmq-server"], list(login))
        return await _run(command, log, login, url, check_rabbitmq)

    return await with_fresh_ports(start)


async def start_redis(engine: str, folder: Path, step: ProgressStep) -> BrokerServer:
    """Run Redis without persistence in a container; return when it answers. Raises BrokersError."""
    await _pull(engine, REDIS_IMAGE, folder / "pull-redis.log", step)
    password = token_urlsafe(12)

    async def start(attempt: int) -> BrokerServer:
        (port,) = free_ports(1)
        url = f"redis://:{password}@{LOOPBACK}:{port}/0"
        log = folder / f"redis-container-{attempt}.log"
        server = ["redis-server", "--requirepass", password, "--save", "", "--appendonly", "no"]
        command = run_command(engine, REDIS_IMAGE, f"{LOOPBACK}:{port}:6379", server, [])
        return await _run(command, log, {}, url, check_redis)

    return await with_fresh_ports(start)


def run_command(engine: str, image: str, publish: str, server: list[str], passed_on: list[str]) -> list[str]:
    """Return the client's command line.

    passed_on: names of environment variables, so that their values stay out of the command line.
    """
    name = f"wisp-{server[0]}-{token_hex(3)}"
    variables = [part for variable in passed_on for part in ("--env", variable)]
    return [
        *(engine, "run", "--rm", "--interactive", "--name", name, "--publish", publish, *variables),
        *("--entrypoint", "sh", image, "-c", UNTIL_INPUT_CLOSES, "wisp", *server),
    ]


async def _run(
    command: list[str], log: Path, login: dict[str, str], url: str, check: Callable[[str], Awaitable[str]]
) -> BrokerServer:
    process = await Process.start(
        command[command.index("--name") + 1], command, log=log, environment={**os.environ, **login}, hold_input=True
    )
    try:
        await until_ready(lambda: check(url), process, log, START_S)
    except BaseException:
        await asyncio.shield(kill(process))
        raise
    return BrokerServer(url, (process,))


async def _pull(engine: str, image: str, log: Path, step: ProgressStep) -> None:
    """Fetch the image if it is missing."""
    inspect = await Process.start("inspect", [engine, "image", "inspect", image], log=log, environment=os.environ)
    if await inspect.wait() == 0:
        return
    step.detail(f"fetching {image}")
    pull = await Process.start("pull", [engine, "pull", image], log=log, environment=os.environ)
    try:
        while pull.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await pull.wait()
            step.detail(f"fetching {image}: {pull.tail(1)}")
    except BaseException:
        await asyncio.shield(pull.stop())
        raise
    if pull.returncode:
        raise BrokersError(
            f"{engine} could not fetch {image}:\n{pull.tail(5)}\nTry `{engine} pull {image}` by hand, or install "
            "RabbitMQ and Redis (`wisp doctor` shows the commands), or set WISP_AMQP_URL and WISP_REDIS_URL."
        )
