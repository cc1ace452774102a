"""A service's loops: started together, and ended together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest
from patience import HANG_S

from shared.runtime import service
from shared.runtime.service import running


async def test_a_loop_that_loses_a_cancellation_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "CANCEL_AGAIN_S", 0.05)
    lost = 0

    async def loop() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost += 1

    stop = asyncio.Event()
    stop.set()
    async with asyncio.timeout(HANG_S), running(stop, loop()):
        await asyncio.sleep(0)
    assert lost == 1


async def test_a_loop_that_fails_is_the_end_of_all() -> None:
    cancelled = asyncio.Event()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    async def goes_on() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with pytest.raises(ValueError, match="broken"):
        async with running(asyncio.Event(), goes_on(), fails()):
            pytest.fail("nobody has stopped it")
    assert cancelled.is_set()


@pytest.mark.parametrize("answers", ["nothing", "the end of the connection"])
async def test_a_service_that_waits_for_rabbitmq_ends_at_once(answers: str) -> None:
    connected = asyncio.Event()
    open_ones = []

    async def rabbitmq(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        # The first connection is the service's look whether something listens.
        if len(open_ones) > 1:
            connected.set()
        if answers != "nothing":
            writer.close()

    server = await asyncio.start_server(rabbitmq, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    environment = os.environ | {"WISP_AMQP_URL": f"amqp://127.0.0.1:{port}/", "WISP_METRICS_PORT": "0"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.estimator", env=environment)
    try:
        await asyncio.wait_for(connected.wait(), HANG_S)
        process.send_signal(signal.SIGTERM)
        # A service that goes on waiting gives up after a time, and ends with 1.
        assert await asyncio.wait_for(process.wait(), HANG_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for writer in open_ones:
            writer.close()
        server.close()
