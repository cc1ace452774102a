"""A service's loops: started together, and ended together."""

from __future__ import annotations

import asyncio

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
