"""`wisp top`: what passes through a running suite, live in the terminal. Nothing in the suite depends on it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict, replace
from secrets import token_hex
from typing import Any

import aio_pika
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq.exceptions import ChannelNotFoundEntity
from rich.console import Console
from rich.live import Live

from services.tools.cli.core.suite_view import suite_view
from services.tools.cli.core.suite_watch import SuiteWatch
from services.tools.cli.suite_address import SuiteAddress
from shared.broker import topology
from shared.broker.client import Broker, without_password
from shared.broker.topology import Topology
from shared.errors import BrokersError, SettingsError
from shared.messages import Message

REFRESH_S = 0.5
PROVE_S = 2.0
KEPT = 10_000
"""Messages that wait for an observer that was stopped; older ones are dropped, so that it cannot fill the broker."""


def now_ms() -> float:
    """This process's monotonic clock, in milliseconds."""
    return time.monotonic() * 1000


class SuiteObserver:
    """Listens at a suite's broker."""

    def __init__(self, where: SuiteAddress) -> None:
        self.watch = SuiteWatch(now_ms())
        self.listening = asyncio.Event()
        self.problem: str | None = f"connecting to RabbitMQ at {without_password(where.amqp_url)}"
        """What is wrong with the connection now, in words."""
        self._where = where

    async def keep_listening(self) -> None:
        """As `listen`, and try again for ever when there is no broker."""
        while True:
            try:
                await self.listen()
            except BrokersError as error:
                self.problem = f"{error}; trying again"

    async def listen(self) -> None:
        """Listen until cancelled, through lost connections. Raises BrokersError when no broker answers at first, and
        SettingsError when it knows no such suite."""
        await _require_suite(self._where)
        name = f"top-{token_hex(4)}"
        broker = await Broker.connect(self._where.amqp_url, Topology(self._where.namespace), name, tls=self._where.tls)
        try:
            own = replace(
                broker.topology.own_queue("top", name, topology.ROLES["top"].listens), arguments={"x-max-length": KEPT}
            )
            await broker.consume(own, self._receive)
            self.watch = SuiteWatch(now_ms())
            self.listening.set()
            while True:
                try:
                    await broker.prove(own)
                    self.problem = None
                except (BrokersError, TimeoutError):
                    address = without_password(self._where.amqp_url)
                    self.problem = f"RabbitMQ at {address} does not answer: this is what was seen before; trying again"
                await asyncio.sleep(PROVE_S)
        finally:
            with suppress(Exception):
                await broker.close()

    async def _receive(self, message: Message) -> None:
        self.watch.feed(message, now_ms())


async def _require_suite(where: SuiteAddress) -> None:
    """Raises SettingsError when no suite of this name has ever been at the broker. Joining it would declare what the
    name asks for, and an observer of a mistyped name would leave that behind."""
    context = where.tls.context() if where.amqp_url.startswith("amqps:") else None
    try:
        async with asyncio.timeout(PROVE_S), await aio_pika.connect(where.amqp_url, ssl_context=context) as connection:
            channel = await connection.channel()
            await channel.declare_exchange(Topology(where.namespace).exchange, passive=True)
    except ChannelNotFoundEntity as error:
        raise SettingsError(
            f"there is no suite {where.namespace!r} at RabbitMQ at {without_password(where.amqp_url)}; name another "
            "with --namespace or WISP_NAMESPACE (without, the suite that runs on this machine is taken), or its "
            "RabbitMQ with --amqp-url"
        ) from error
    except (*CONNECTION_EXCEPTIONS, TimeoutError):
        return  # the connection that is kept says what is wrong, and is tried again


async def live(where: SuiteAddress, console: Console) -> None:
    """Show the suite until cancelled. Raises SettingsError when there is no such suite."""
    observer = SuiteObserver(where)

    async def draw() -> None:
        with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as screen:
            while True:
                shown = suite_view(observer.watch.snapshot(now_ms()), where.namespace, observer.problem or where.note)
                screen.update(shown, refresh=True)
                await asyncio.sleep(REFRESH_S)

    await _until_first(observer.keep_listening(), draw())


async def once_seen(where: SuiteAddress, console: Console, seconds: float, *, as_json: bool = False) -> None:
    """Print what was seen in so many seconds. Raises BrokersError when the broker cannot be reached, and SettingsError
    when it knows no such suite."""
    observer = SuiteObserver(where)

    async def observe() -> None:
        await observer.listening.wait()
        await asyncio.sleep(seconds)

    await _until_first(observer.listen(), observe())
    snapshot = observer.watch.snapshot(now_ms())
    if as_json:
        told = {"namespace": where.namespace, "empty": snapshot.empty, **asdict(snapshot)}
        console.print_json(json.dumps(told), indent=1)
    else:
        console.print(suite_view(snapshot, where.namespace, where.note))


async def _until_first(*work: Coroutine[Any, Any, None]) -> None:
    """Run side by side until one ends; raises what it raised."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
