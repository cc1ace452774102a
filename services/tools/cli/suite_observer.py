"""Observes the messages of a running suite for `wisp top`. Nothing in the suite depends on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict, replace
from secrets import token_hex
from typing import Any

from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq.exceptions import AMQPError, ChannelNotFoundEntity
from rich.console import Console
from rich.live import Live

from services.tools.cli.core.suite_snapshot import SuiteSnapshot
from services.tools.cli.core.suite_view import suite_view
from services.tools.cli.core.suite_watch import SuiteWatch
from services.tools.cli.suite_address import SuiteAddress
from services.tools.cli.terminal import print_fields
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.connection import connect_once, in_words, without_password
from shared.broker.topology import Topology
from shared.errors import BrokersError, SettingsError
from shared.messages import Message

REFRESH_S = 0.5
PROVE_S = 2.0
CONNECT_S = 5.0
QUEUE_LENGTH = 10_000
"""Most messages in the observer's queue. Older ones are dropped, so that a stopped observer cannot fill the broker."""


def now_ms() -> float:
    """Return this process's monotonic clock in milliseconds."""
    return time.monotonic() * 1000


class SuiteObserver:
    """Receives a suite's messages from its broker."""

    def __init__(self, suite: SuiteAddress) -> None:
        self.watch = SuiteWatch(now_ms())
        self.listening = asyncio.Event()
        self.problem: str | None = f"connecting to RabbitMQ at {without_password(suite.amqp_url)}"
        """The current problem with the connection, for people."""
        self._suite = suite

    async def keep_listening(self) -> None:
        """Call `listen`, and repeat the call while the broker cannot be reached."""
        while True:
            try:
                await self.listen()
            except BrokersError as error:
                self.problem = f"{error}; trying again"
                await asyncio.sleep(PROVE_S)

    async def listen(self) -> None:
        """Receive messages until cancelled, across lost connections.

        Raises BrokersError if the broker does not answer at first, and SettingsError if it has no such suite.
        """
        await _require_suite(self._suite)
        name = f"top-{token_hex(4)}"
        broker = await Broker.connect(self._suite.amqp_url, Topology(self._suite.namespace), name, tls=self._suite.tls)
        try:
            own = replace(
                broker.topology.own_queue("top", name, topology.ROLES["top"].listens),
                arguments={"x-max-length": QUEUE_LENGTH},
            )
            await broker.consume(own, self._receive)
            self.watch = SuiteWatch(now_ms())
            self.listening.set()
            while True:
                try:
                    await broker.liveness.prove(own)
                    self.problem = None
                except (BrokersError, TimeoutError):
                    address = without_password(self._suite.amqp_url)
                    self.problem = (
                        f"RabbitMQ at {address} does not answer; showing the last known state and trying again"
                    )
                await asyncio.sleep(PROVE_S)
        finally:
            with suppress(Exception):
                await broker.close()

    async def _receive(self, message: Message) -> None:
        self.watch.feed(message, now_ms())


async def _require_suite(suite: SuiteAddress) -> None:
    """Raise SettingsError unless the broker has the suite's exchange, and BrokersError if the broker cannot be used.

    Connecting would declare the exchange, and an observer of a mistyped name would leave it behind.
    """
    context = suite.tls.context() if "amqps:" in suite.amqp_url else None
    try:
        async with asyncio.timeout(CONNECT_S):
            connection = await connect_once(suite.amqp_url, context)
            async with connection:
                channel = await connection.channel()
                await channel.declare_exchange(Topology(suite.namespace).exchange, passive=True)
    except ChannelNotFoundEntity as error:
        raise SettingsError(
            f"there is no suite {suite.namespace!r} at RabbitMQ at {without_password(suite.amqp_url)}; name another "
            "suite with --namespace or WISP_NAMESPACE (by default, the one running on this machine), or its RabbitMQ "
            "with --amqp-url"
        ) from error
    except (*CONNECTION_EXCEPTIONS, AMQPError, TimeoutError) as error:
        tried = f"RabbitMQ cannot be used at {without_password(suite.amqp_url)} ({in_words(error)})"
        advice = "name the suite's RabbitMQ with --amqp-url or WISP_AMQP_URL"
        if suite.absent:
            raise BrokersError(f"{suite.absent}; start one with `wisp up`, or {advice}: {tried}") from error
        raise BrokersError(f"{tried}; {advice}") from error


async def live(suite: SuiteAddress, console: Console) -> None:
    """Show the suite until cancelled. Raises SettingsError if there is no such suite."""
    observer = SuiteObserver(suite)

    async def draw() -> None:
        with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as screen:
            while True:
                shown = suite_view(observer.watch.snapshot(now_ms()), suite.namespace, observer.problem or suite.note)
                screen.update(shown, refresh=True)
                await asyncio.sleep(REFRESH_S)

    await _until_first(observer.keep_listening(), draw())


async def once_seen(suite: SuiteAddress, console: Console, seconds: float, *, as_json: bool = False) -> None:
    """Observe for `seconds` and print the result. Raises the errors of `observed`."""
    snapshot = await observed(suite, seconds)
    if as_json:
        fields = {"namespace": suite.namespace, "empty": snapshot.empty, **asdict(snapshot)}
        print_fields(console, fields)
    else:
        console.print(suite_view(snapshot, suite.namespace, suite.note))


async def observed(suite: SuiteAddress, seconds: float) -> SuiteSnapshot:
    """Return the state of a suite after `seconds` of observation.

    Raises BrokersError if the broker cannot be reached, and SettingsError if it has no such suite.
    """
    observer = SuiteObserver(suite)

    async def observe() -> None:
        await observer.listening.wait()
        await asyncio.sleep(seconds)

    await _until_first(observer.listen(), observe())
    return observer.watch.snapshot(now_ms())


async def _until_first(*work: Coroutine[Any, Any, None]) -> None:
    """Run coroutines concurrently until one ends; raise its error."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
