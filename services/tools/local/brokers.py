"""RabbitMQ and Redis for one run: given, private, or in containers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from services.tools.local import apt, broker_sources, containers, servers
from services.tools.local.broker_check import NotReady, check_rabbitmq, check_redis, without_password
from services.tools.local.broker_sources import BrokerSource
from services.tools.local.machine import Machine, container_engine, inspect_machine
from services.tools.local.progress import Progress, ProgressStep
from services.tools.local.servers import BrokerServer
from services.tools.local.settings import BrokerAddresses
from shared.errors import BrokersError
from shared.runtime.tls import Tls

WORDS = {BrokerSource.GIVEN: "given", BrokerSource.INSTALLED: "private", BrokerSource.CONTAINER: "in a container"}


class Brokers:
    """Both brokers, as an async context manager. At the end it stops the servers that it started.

    The caller owns `folder`, which holds the files of private servers. `addresses` defaults to WISP_AMQP_URL and
    WISP_REDIS_URL in the environment. Start it from a thread that outlives the brokers: they die with it. Raises
    BrokersError with a next step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        addresses: BrokerAddresses | None = None,
        look: Callable[[], Machine] = inspect_machine,
        progress: Progress | None = None,
        persistent: bool = False,
    ) -> None:
        """persistent: a private Redis keeps its data across a kill and restart. look: returns the machine's facts."""
        self.folder = folder
        self.addresses = addresses or BrokerAddresses()
        self.amqp_url = ""
        self.redis_url = ""
        self.rabbitmq_version = ""
        self.redis_version = ""
        self.servers: list[BrokerServer] = []
        """The servers started here, which are stopped at the end."""
        self._look = look
        self._progress = progress or Progress()
        self._persistent = persistent
        self._addressed = asyncio.Event()

    @property
    def given(self) -> bool:
        """True if at least one broker was given, so that it outlives this run."""
        return bool(self.addresses.amqp_url or self.addresses.redis_url)

    @property
    def tls(self) -> Tls:
        """TLS settings for given servers; private ones have no certificates."""
        return self.addresses.tls

    async def __aenter__(self) -> Brokers:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def until_addressed(self) -> None:
        """Wait until the URLs of both are known. Private servers do not answer yet then.

        A server whose port was taken meanwhile gets another URL before `start` returns.
        """
        await self._addressed.wait()

    async def start(self) -> None:
        """Find or start both concurrently, and check that they answer."""
        host = self._look()
        chosen = broker_sources.choose_sources(self.addresses, host)
        failed = await self._install(chosen.of(BrokerSource.APT))
        if chosen.of(BrokerSource.APT):
            host = replace(self._look(), apt=False)
            chosen = broker_sources.choose_sources(self.addresses, host)
        if chosen.of(BrokerSource.MISSING):
            host = replace(host, container=await container_engine())
            chosen = broker_sources.choose_sources(self.addresses, host)
        if lacking := chosen.of(BrokerSource.MISSING):
            raise failed or broker_sources.missing_brokers(lacking, host)
        with self._progress.step("starting RabbitMQ and Redis") as step:
            tasks = [
                asyncio.ensure_future(self._start_rabbitmq(chosen.rabbitmq, host, step)),
                asyncio.ensure_future(self._start_redis(chosen.redis, host, step)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in tasks:
                    if task.done():
                        task.result()
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self.stop()
                raise
            step.done(
                f"{self.rabbitmq_version} ({WORDS[chosen.rabbitmq]}) and {self.redis_version} ({WORDS[chosen.redis]})"
            )

    async def _install(self, names: list[str]) -> BrokersError | None:
        """Install brokers with apt. Returns its error, which matters only where containers are no alternative."""
        if not names:
            return None
        try:
            with self._progress.step(f"installing {' and '.join(names)} with apt") as step:
                await apt.install(names, self.folder / "apt.log", step)
        except BrokersError as error:
            return error
        return None

    async def _start_rabbitmq(self, source: BrokerSource, host: Machine, step: ProgressStep) -> None:
        if source is BrokerSource.GIVEN:
            self._rabbitmq_at(self.addresses.amqp_url or "")
        elif source is BrokerSource.CONTAINER:
            self._rabbitmq_at(self._keep(await containers.start_rabbitmq(host.container or "", self.folder, step)))
        else:
            assert host.rabbitmq is not None
            assert host.epmd is not None
            self._keep(await servers.start_rabbitmq(host.rabbitmq, host.epmd, self.folder, launched=self._rabbitmq_at))
        self.rabbitmq_version = await _checked("RabbitMQ", "WISP_AMQP_URL", check_rabbitmq, self.amqp_url, self.tls)

    async def _start_redis(self, source: BrokerSource, host: Machine, step: ProgressStep) -> None:
        if source is BrokerSource.GIVEN:
            self._redis_at(self.addresses.redis_url or "")
        elif source is BrokerSource.CONTAINER:
            self._redis_at(self._keep(await containers.start_redis(host.container or "", self.folder, step)))
        else:
            assert host.redis is not None
            self._keep(
                await servers.start_redis(host.redis, self.folder, persistent=self._persistent, launched=self._redis_at)
            )
        self.redis_version = await _checked("Redis", "WISP_REDIS_URL", check_redis, self.redis_url, self.tls)

    def _rabbitmq_at(self, url: str) -> None:
        self.amqp_url = url
        self._note_addresses()

    def _redis_at(self, url: str) -> None:
        self.redis_url = url
        self._note_addresses()

    def _note_addresses(self) -> None:
        if self.amqp_url and self.redis_url:
            self._addressed.set()

    def _keep(self, server: BrokerServer) -> str:
        self.servers.append(server)
        return server.url

    async def stop(self) -> None:
        """Stop the servers that were started, concurrently."""
        servers, self.servers = self.servers, []
        await asyncio.gather(*(server.stop() for server in servers))


async def _checked(name: str, setting: str, check: Callable[[str, Tls], Awaitable[str]], url: str, tls: Tls) -> str:
    try:
        return await check(url, tls)
    except NotReady as error:
        raise BrokersError(
            f"{name} does not answer at {without_password(url)}: {error}.\n"
            f"The address comes from {setting}: start the server, correct the address, or unset {setting} for a "
            "private server."
        ) from None
