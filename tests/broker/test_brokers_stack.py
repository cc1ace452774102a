"""Services as processes: they start, are watched, and end even if their owner is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aio_pika
import pytest
from aiormq.exceptions import ChannelNotFoundEntity
from leftovers import descendants, leftovers
from patience import HANG_S

from services.tools.local.background import Background
from services.tools.local.brokers import Brokers
from services.tools.local.service_processes import ServiceFailed
from services.tools.local.stack import Stack
from shared.broker.topology import Topology
from shared.errors import SettingsError

OWNER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import asyncio, sys
from services.tools.local.stack import Stack
from services.tools.cli.terminal import run

async def main():
    async with Stack("owner", verifiers=0, gateways=0, drafters=0):
        print("ready", flush=True)
        await asyncio.sleep(600)

try:
    run(main)
except (KeyboardInterrupt, asyncio.CancelledError):
    sys.exit(9)
"""


def light(brokers: Brokers) -> Stack:
    """A stack without a model, which starts in a second."""
    return Stack("test-light", brokers=brokers, verifiers=0, gateways=0, drafters=0)


async def test_processes_start_have_names_and_stop(brokers: Brokers) -> None:
    async with light(brokers) as stack:
        assert [process.name for process in stack.processes()] == ["scheduler-1", "estimator-1"]
        (second,) = await stack.start("scheduler", env={"WISP_POLICY": "fcfs"})
        assert second.name == "scheduler-2"
        assert "fcfs" in second.log.read_text()
        assert await stack.stop(second) == 0
        assert [process.name for process in stack.processes("scheduler")] == ["scheduler-1"]
        running = stack.processes()
    assert not any(process.alive for process in running)
    assert not stack.folder.exists()


async def test_a_process_that_ends_before_it_is_ready_is_replaced(brokers: Brokers, tmp_path: Path) -> None:
    flag = tmp_path / "second"
    once = ("sh", "-c", 'if [ -e "$0" ]; then exec "$@"; else touch "$0"; echo away; exit 3; fi', str(flag))
    async with light(brokers) as stack:
        with pytest.raises(ServiceFailed, match=r"(?s)scheduler-2 ended with status 3 before it was ready.*away"):
            await stack.start("scheduler", under=once)
        flag.unlink()
        (third,) = await stack.start("scheduler", under=once, tries=2)
        assert third.name == "scheduler-4"
        assert [process.name for process in stack.processes("scheduler")] == ["scheduler-1", "scheduler-4"]
        await stack.watch(asyncio.sleep(0))


async def test_a_service_that_dies_is_reported_with_the_end_of_its_log(brokers: Brokers) -> None:
    async with light(brokers) as stack:
        victim = stack.processes("scheduler")[0]
        work = asyncio.create_task(stack.watch(asyncio.sleep(60)))
        await asyncio.sleep(0)
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(ServiceFailed, match=r"(?s)scheduler-1 ended with status -9.*ready"):
            await work
        assert not stack.complete


async def test_a_deliberate_stop_is_no_failure(brokers: Brokers) -> None:
    async with light(brokers) as stack:
        assert await stack.stop(stack.processes("estimator")[0], signal.SIGKILL) == -signal.SIGKILL
        assert await stack.watch(asyncio.sleep(0.1, "done")) == "done"


@pytest.mark.parametrize("whose", ["env", "env_of"])
async def test_bad_settings_of_a_service_are_shown(brokers: Brokers, whose: str) -> None:
    bad = {"WISP_POLICY": "no-such-policy"}
    env, env_of = (bad, {}) if whose == "env" else ({}, {"scheduler": bad, "estimator": {"WISP_POLICY": "fcfs"}})
    stack = Stack("test-bad", brokers=brokers, verifiers=0, gateways=0, drafters=0, env=env, env_of=env_of)
    with pytest.raises(SettingsError, match=r"WISP_POLICY.*no-such-policy"):
        await stack.__aenter__()


async def test_given_brokers_keep_nothing_of_a_run(brokers: Brokers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_AMQP_URL", brokers.amqp_url)
    monkeypatch.setenv("WISP_REDIS_URL", brokers.redis_url)
    async with Stack("test-guest", verifiers=0, gateways=0, drafters=0) as stack:
        queue = Topology(stack.namespace).verify_queue().name
        assert await _exists(brokers, queue)
    assert not await _exists(brokers, queue)


def test_a_stack_runs_in_the_background_of_a_thread(brokers: Brokers) -> None:
    with Background(light(brokers)) as background:
        victim = background.stack.processes("estimator")[0]
        os.kill(victim.pid, signal.SIGKILL)
        deadline = time.monotonic() + HANG_S
        while background.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "estimator-1 ended" in str(background.failure)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 9), (signal.SIGTERM, 9), (signal.SIGKILL, -9)])
def test_no_process_is_left_however_the_owner_ends(number: signal.Signals, status: int) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    started = descendants(owner.pid)
    assert {"beam.smp", "redis-server", "epmd"} <= {process.name() for process in started}
    os.kill(owner.pid, number)
    assert owner.wait() == status
    owner.stdout.close()
    assert leftovers(started) == []


async def _exists(brokers: Brokers, queue: str) -> bool:
    async with await aio_pika.connect(brokers.amqp_url) as connection:
        channel = await connection.channel()
        try:
            await channel.declare_queue(queue, passive=True)
        except ChannelNotFoundEntity:
            return False
        return True
