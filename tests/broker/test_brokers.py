"""Private brokers start beside others, answer, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from leftovers import descendants, leftovers
from patience import HANG_S

from services.tools.cli import doctor_servers
from services.tools.local import servers
from services.tools.local.broker_check import NotReady, check_rabbitmq, check_redis
from services.tools.local.brokers import Brokers
from services.tools.local.machine import Machine, inspect_machine
from services.tools.local.ports import free_ports
from services.tools.local.settings import BrokerAddresses
from shared.errors import BrokersError
from shared.state.store import Store

PRIVATE = BrokerAddresses(amqp_url=None, redis_url=None)
NOTHING = Machine(rabbitmq=None, epmd=None, redis=None, distribution="debian", root=False, apt=True, container=None)

OWNER = """
import asyncio, sys
from pathlib import Path
from services.tools.local.brokers import Brokers
from services.tools.local.settings import BrokerAddresses

async def main():
    async with Brokers(Path(sys.argv[1]), addresses=BrokerAddresses(amqp_url=None, redis_url=None)):
        print("ready", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_brokers_of_the_run_answer(brokers: Brokers) -> None:
    assert await check_rabbitmq(brokers.amqp_url) == brokers.rabbitmq_version
    assert await check_redis(brokers.redis_url) == brokers.redis_version


async def test_a_redis_cluster_is_refused(tmp_path: Path) -> None:
    redis = inspect_machine().redis
    assert redis is not None
    port, bus_port = free_ports(2)
    options = ["--port", str(port), "--cluster-port", str(bus_port), "--bind", "127.0.0.1"]
    options += ["--cluster-enabled", "yes", "--save", ""]
    cluster = await asyncio.create_subprocess_exec(redis, *options, cwd=tmp_path, stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        for _ in range(100):
            with pytest.raises(NotReady) as refused:
                await check_redis(url)
            if "it is a Redis Cluster" in str(refused.value):
                break
            await asyncio.sleep(0.1)
        store = Store.connect(url, "n")
        with pytest.raises(BrokersError, match="WISP_REDIS_URL is a Redis Cluster"):
            await store.refuse_cluster()
        await store.close()
        (_, finding) = await doctor_servers.check_brokers(BrokerAddresses(amqp_url=None, redis_url=url), NOTHING)
        assert finding.state == "missing"
        assert "it is a Redis Cluster" in finding.found
    finally:
        cluster.kill()
        await cluster.wait()


async def test_a_second_instance_runs_beside_the_first_and_leaves_nothing(brokers: Brokers, tmp_path: Path) -> None:
    before = descendants(os.getpid())
    async with Brokers(tmp_path, addresses=PRIVATE) as second:
        assert second.amqp_url != brokers.amqp_url
        assert second.redis_url != brokers.redis_url
        await check_rabbitmq(second.amqp_url)
        started = [process for process in descendants(os.getpid()) if process not in before]
        assert {"redis-server", "epmd", "beam.smp"} <= {process.name() for process in started}
        listening = {address.ip for process in started for address in _listening(process)}
        assert listening <= {"127.0.0.1", "::1"}
        own = [process for server in second.servers for process in server.processes]
    assert len(own) == 3
    assert -signal.SIGKILL not in {process.returncode for process in own}, "they stop when asked"
    assert leftovers(started) == []
    await check_rabbitmq(brokers.amqp_url)


def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    started = descendants(owner.pid)
    assert {"redis-server", "epmd", "beam.smp"} <= {process.name() for process in started}
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert leftovers(started) == []


async def test_given_servers_are_used_and_left_running(brokers: Brokers, tmp_path: Path) -> None:
    given = BrokerAddresses(amqp_url=brokers.amqp_url, redis_url=brokers.redis_url)
    async with Brokers(tmp_path, addresses=given, look=lambda: NOTHING) as guest:
        assert (guest.amqp_url, guest.redis_url) == (brokers.amqp_url, brokers.redis_url)
        assert guest.servers == []
    await check_rabbitmq(brokers.amqp_url)
    await check_redis(brokers.redis_url)


async def test_a_given_redis_goes_with_a_private_rabbitmq(brokers: Brokers, tmp_path: Path) -> None:
    given = BrokerAddresses(amqp_url=None, redis_url=brokers.redis_url)
    async with Brokers(tmp_path, addresses=given) as mixed:
        assert mixed.redis_url == brokers.redis_url
        assert mixed.amqp_url != brokers.amqp_url
        assert len(mixed.servers) == 1


async def test_an_unreachable_given_address_is_named_without_its_password(brokers: Brokers, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    given = BrokerAddresses(amqp_url=f"amqp://me:secret@127.0.0.1:{port}/", redis_url=brokers.redis_url)
    with pytest.raises(BrokersError, match="WISP_AMQP_URL") as caught:
        await Brokers(tmp_path, addresses=given).start()
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_private_server_is_stopped_when_the_given_one_fails(tmp_path: Path) -> None:
    before = descendants(os.getpid())
    (port,) = free_ports(1)
    broken = Brokers(tmp_path, addresses=BrokerAddresses(amqp_url=None, redis_url=f"redis://127.0.0.1:{port}/0"))
    with pytest.raises(BrokersError, match="WISP_REDIS_URL"):
        await broken.start()
    assert leftovers([process for process in descendants(os.getpid()) if process not in before]) == []


async def test_a_refused_login_is_reported_as_such(brokers: Brokers, tmp_path: Path) -> None:
    wrong = brokers.amqp_url.replace("wisp:", "wisp:not-", 1)
    with pytest.raises(BrokersError, match=r"(?i)access|refused|login"):
        await Brokers(tmp_path, addresses=BrokerAddresses(amqp_url=wrong, redis_url=brokers.redis_url)).start()


async def test_with_nothing_installed_the_error_names_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BrokersError, match="sudo apt-get install"):
        await Brokers(tmp_path, addresses=PRIVATE, look=lambda: NOTHING).start()


async def test_a_port_taken_meanwhile_is_replaced(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = int(brokers.redis_url.rsplit(":", 1)[1].split("/")[0])
    offers = [[taken], free_ports(1)]
    monkeypatch.setattr(servers, "free_ports", lambda count: offers.pop(0))
    redis = inspect_machine().redis
    assert redis is not None
    server = await servers.start_redis(redis, tmp_path)
    try:
        assert offers == []
        await check_redis(server.url)
    finally:
        await server.stop()


async def test_a_server_that_cannot_start_shows_its_own_output(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(BrokersError, match=r"(?s)status 3.*no such luck"):
        await servers.start_redis(broken, tmp_path)


async def test_a_start_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    before = descendants(os.getpid())
    start = asyncio.create_task(Brokers(tmp_path, addresses=PRIVATE).start())
    started: list[psutil.Process] = []
    async with asyncio.timeout(HANG_S):
        while "beam.smp" not in names_of(started):
            await asyncio.sleep(0.05)
            started = [process for process in descendants(os.getpid()) if process not in before]
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert leftovers(started) == []


def names_of(processes: list[psutil.Process]) -> set[str]:
    """Return the names of those that have not ended meanwhile."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found.add(process.name())
    return found


def _listening(process: psutil.Process) -> list[psutil._common.addr]:
    return [connection.laddr for connection in process.net_connections() if connection.status == psutil.CONN_LISTEN]
