"""A RabbitMQ cluster of several nodes on this machine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from patience import HANG_S
from rabbitmqctl import rabbitmqctl

from services.tools.local import servers
from services.tools.local.broker_check import CLUSTER_ADVANCED, check_rabbitmq, cluster_settings
from services.tools.local.machine import inspect_machine, version_in
from services.tools.local.ports import free_ports
from services.tools.local.process import Process
from services.tools.local.servers import BrokerServer

SEED = "wisp@localhost"
MINIMUM = "rabbit_quorum_queue:list_with_minimum_quorum"
"""Erlang's name of RabbitMQ's list of the queues that would have no majority without the node that is asked."""


@asynccontextmanager
async def rabbitmq_cluster(folder: Path, nodes: int = 3) -> AsyncIterator[list[BrokerServer]]:
    """Run a cluster; its nodes can be killed, stopped and restarted one by one."""
    host = inspect_machine()
    assert host.rabbitmq is not None
    assert host.epmd is not None
    conf = "".join(f"{line}\n" for line in cluster_settings(version_in(str(host.rabbitmq))))
    seed = await servers.start_rabbitmq(host.rabbitmq, host.epmd, folder / "node-1", conf, advanced=CLUSTER_ADVANCED)
    running = [seed]
    try:
        for number in range(2, nodes + 1):
            url, environment, start = _further_node(seed, host.rabbitmq, folder / f"node-{number}", number)
            running += [BrokerServer(url, (await start(),), start_again=start, environment=environment)]
        yield running
    finally:
        await asyncio.gather(*(node.kill() for node in running))
        await seed.stop()


async def until_redundant(node: BrokerServer) -> None:
    """Wait until every replicated queue goes on without this node: its other replicas are back and up to date."""
    async with asyncio.timeout(HANG_S):
        while (await rabbitmqctl(node, "eval", f"{MINIMUM}().")).split()[-1] != "[]":  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.2)


def _further_node(
    seed: BrokerServer, script: Path, folder: Path, number: int
) -> tuple[str, dict[str, str], Callable[[], Awaitable[Process]]]:
    """Configure a node with the seed's users, cookie and port mapper; return its URL, environment and start."""
    port, distribution_port = free_ports(2)
    name = f"wisp{number}@localhost"
    folder.mkdir()
    lines = Path(seed.environment["RABBITMQ_CONFIG_FILE"]).read_text().splitlines()
    lines[0] = f"listeners.tcp.1 = 127.0.0.1:{port}"
    lines += [
        "cluster_formation.peer_discovery_backend = classic_config",
        f"cluster_formation.classic_config.nodes.1 = {SEED}",
        f"cluster_formation.classic_config.nodes.2 = {name}",
    ]
    conf = folder / "rabbitmq.conf"
    conf.touch(0o600)
    conf.write_text("\n".join(lines) + "\n")
    environment = dict(seed.environment) | {
        "RABBITMQ_NODENAME": name,
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_LOGS": str(folder / "rabbitmq.log"),
        "RABBITMQ_CONFIG_FILE": str(conf),
        "RABBITMQ_PID_FILE": str(folder / "rabbitmq.pid"),
    }
    address = seed.url.rpartition(":")[0]
    url = f"{address}:{port}/"

    async def start() -> Process:
        node = await Process.start(
            f"rabbitmq-{number}",
            [str(script), "-noinput"],
            log=folder / "console.log",
            environment=environment,
            folder=folder,
        )
        try:
            await servers.until_ready(
                lambda: check_rabbitmq(url), node, folder / "rabbitmq.log", servers.RABBITMQ_START_S
            )
        except BaseException:
            await asyncio.shield(node.stop(signal.SIGKILL))
            raise
        return node

    return url, environment, start
