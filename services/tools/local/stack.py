"""The suite of one run on this machine: brokers, and the services as processes."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from aiormq.exceptions import AMQPError
from redis.exceptions import RedisError

from services.tools.local.brokers import Brokers
from services.tools.local.folder import RunFolder, RunningSuite, note_suite, state_folder
from services.tools.local.namespace import delete_namespace
from services.tools.local.ports import LOOPBACK
from services.tools.local.process import Process
from services.tools.local.progress import Progress
from services.tools.local.service_commands import API_SERVICES, STOP_ORDER, ServiceCommands, Serving
from services.tools.local.service_processes import STOP_GRACE_S, ServiceFailed, ServiceProcesses
from services.tools.local.service_settings import refuse_bad_settings
from services.tools.local.settings import DEFAULT_TARGET, BrokerAddresses, LocalSettings
from shared.broker.client import CONNECT_TIMEOUT_S
from shared.runtime.settings import AMQP_EXAMPLE, REDIS_EXAMPLE

T = TypeVar("T")


class Stack:
    """Async context manager with the brokers and services of one run. Inside it, everything is ready.

    gateways, drafters, ...: number of processes, 0 or more. serving: with a baseline, the stack is one process of the
    service `baseline`, without brokers, and the numbers have no effect. target: folder of a prepared model. env: added
    to this process's environment for every service. env_of: further variables by service, which take precedence.
    brokers: given ones are not stopped; by default the stack has its own. port: 0 lets the system choose.

    Start it from a thread that outlives it: the processes die with the thread. Raises WispError if a part does not
    start; the parts that did are stopped first.
    """

    def __init__(
        self,
        purpose: str = "stack",
        *,
        gateways: int = 1,
        drafters: int = 1,
        schedulers: int = 1,
        estimators: int = 1,
        verifiers: int = 1,
        serving: Serving = "wisp",
        target: Path | None = None,
        env: Mapping[str, str] | None = None,
        env_of: Mapping[str, Mapping[str, str]] | None = None,
        brokers: Brokers | None = None,
        namespace: str | None = None,
        host: str = LOOPBACK,
        port: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.purpose = purpose
        suite = {
            "scheduler": schedulers,
            "estimator": estimators,
            "verifier": verifiers,
            "drafter": drafters,
            "gateway": gateways,
        }
        self.serving = serving
        self.counts = suite if serving == "wisp" else {"baseline": 1}
        self.target = (target or state_folder() / "models" / DEFAULT_TARGET).absolute()
        self.env = dict(env or {})
        self.env_of = dict(env_of or {})
        self.host, self.port = host, port
        self._given_brokers = brokers
        self._namespace = namespace
        self._progress = progress or Progress()
        self._services = ServiceProcesses(self.env_of)
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Stack:
        self.refuse_bad_settings()
        async with AsyncExitStack() as resources:
            self._run = resources.enter_context(RunFolder(self.purpose))
            self.folder = self._services.folder = self._run.path
            self.brokers = self._given_brokers or Brokers(self.folder, progress=self._progress)
            has_own = self._given_brokers is None and self.serving == "wisp"
            if has_own:
                resources.push_async_callback(self.brokers.stop)
                await self._start_brokers()
                for server in self.brokers.servers:
                    for process in server.processes:
                        self._services.observe(process)
            self._services.commands = self._make_commands()
            if self.serving == "wisp":
                amqp_url = None if self.brokers.given else self.brokers.amqp_url
                note_suite(self.folder, RunningSuite(self.namespace, amqp_url))
            if has_own and self.namespace == self.folder.name:
                resources.push_async_callback(self._delete_namespace)
            resources.push_async_callback(self._stop_all)
            await self._start_all()
            self._resources = resources.pop_all()
        return self

    def refuse_bad_settings(self, *, target_known: bool = True) -> None:
        """Raise SettingsError if a service would refuse its settings. The start does so before anything else.

        target_known: `target` is set already, so that a draft model is compared with it.
        """
        addresses = self._given_brokers.addresses if self._given_brokers else BrokerAddresses()
        commands = ServiceCommands(
            namespace=self._namespace or LocalSettings().namespace or "new",
            amqp_url=addresses.amqp_url or AMQP_EXAMPLE,
            redis_url=addresses.redis_url or REDIS_EXAMPLE,
            target=self.target,
            host=self.host,
            port=self.port,
            verifiers=1,
            serving=self.serving,
            env=self.env,
        )
        refuse_bad_settings(
            commands,
            {service: self.env_of.get(service, {}) for service, count in self.counts.items() if count},
            target_known=target_known,
        )

    def _make_commands(self) -> ServiceCommands:
        return ServiceCommands(
            namespace=self._namespace or LocalSettings().namespace or self.folder.name,
            amqp_url=self.brokers.amqp_url,
            redis_url=self.brokers.redis_url,
            target=self.target,
            host=self.host,
            port=self.port,
            verifiers=self.counts.get("verifier", 1),
            serving=self.serving,
            env=self.env,
        )

    async def _start_brokers(self) -> None:
        """Start the brokers and, as soon as their addresses are known, the services, which load meanwhile.

        A service ends if the brokers take longer than it waits for them. If one has ended or may be about to, or if an
        address has changed, all services are discarded, and `_start_all` starts them again.
        """
        starting = asyncio.ensure_future(self.brokers.start())
        addressed = asyncio.ensure_future(self.brokers.until_addressed())
        given: tuple[str, str] | None = None
        launched_s = 0.0
        try:
            await asyncio.wait({starting, addressed}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                commands = self._services.commands = self._make_commands()
                given = commands.amqp_url, commands.redis_url
                launched_s = time.monotonic()
                for service in self._wanted():
                    await self._services.launch(service, {})
            await starting
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self._services.discard_all()
            raise
        finally:
            addressed.cancel()
        ended = not all(process.alive for _, process in self._services.launched)
        # One that has given up lives until its end is complete.
        late = time.monotonic() - launched_s > CONNECT_TIMEOUT_S / 2
        if ended or late or given != (self.brokers.amqp_url, self.brokers.redis_url):
            await self._services.discard_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.__aexit__(kind, error, trace)

    @property
    def namespace(self) -> str:
        """Prefix of this stack's exchange, queues and keys."""
        return self._services.commands.namespace

    @property
    def url(self) -> str:
        """The first of `urls`. It ends in `/v1`, as OpenAI clients expect."""
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        """Base URLs of the gateways, or of the baseline, that run and have been ready."""
        there = [process.pid for service in API_SERVICES for process in self.processes(service)]
        return [self._services.urls[pid] for pid in there if pid in self._services.urls]

    def keep_logs(self) -> Path:
        """Keep the services' logs after the end, as after a failure; return their folder."""
        self._run.kept = True
        return self.folder

    def url_of(self, gateway: Process) -> str:
        """Return the base URL of a gateway that has been ready."""
        return self._services.urls[gateway.pid]

    def processes(self, service: str | None = None) -> list[Process]:
        """Return the running processes of a service, or of all, in the order of their start."""
        return self._services.running(service)

    async def start(
        self,
        service: str,
        count: int = 1,
        env: Mapping[str, str] | None = None,
        under: Sequence[str] = (),
        tries: int = 1,
    ) -> list[Process]:
        """Start `count` more processes of a service; return when they are ready.

        env: variables for these processes only. under: a command line that runs the service's command. tries: a process
        that ends before it is ready is replaced until so many have ended, as Kubernetes does while a broker is away.

        Raises ServiceFailed.
        """
        return list(await asyncio.gather(*(self._start_one(service, env or {}, under, tries) for _ in range(count))))

    async def _start_one(self, service: str, env: Mapping[str, str], under: Sequence[str], tries: int) -> Process:
        while True:
            process = await self._services.launch(service, env, under)
            tries -= 1
            try:
                await self._until_ready(service, process)
            except ServiceFailed:
                if process.alive or not tries:
                    raise
            else:
                self._services.observe(process)
                return process

    async def stop(
        self, process: Process, number: signal.Signals = signal.SIGTERM, grace_s: float = STOP_GRACE_S
    ) -> int:
        """Stop one process with a signal; kill it after `grace_s`. Return its exit status."""
        return await self._services.stop(process, number, grace_s)

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`; raise ServiceFailed as soon as a process ends by itself."""
        return await self._services.watch(work)

    async def next_failure(self) -> ServiceFailed:
        """Wait until a process ends by itself; call again for the next one."""
        return await self._services.next_failure()

    @property
    def complete(self) -> bool:
        """True if each service that the stack was started with, and each private broker, is running."""
        brokers = [process for server in self.brokers.servers for process in server.processes]
        return all(self.processes(service) for service, count in self.counts.items() if count) and all(
            process.alive for process in brokers
        )

    def _wanted(self) -> list[str]:
        """Return the service of each process that the stack starts with."""
        return [service for service, count in self.counts.items() for _ in range(count)]

    async def _start_all(self) -> None:
        """Start the services, unless they run already; return when all are ready."""
        wanted = {service: count for service, count in self.counts.items() if count}
        if not wanted:
            return
        with self._progress.step("starting the services") as step:
            for _, process in self._services.launched:
                self._services.observe(process)
            processes = self._services.launched[:] or [
                (service, await self._services.start(service, {})) for service in self._wanted()
            ]
            waiting = {process.name for _, process in processes}

            async def ready(service: str, process: Process) -> None:
                await self._until_ready(service, process)
                waiting.discard(process.name)
                step.detail(f"waiting for {', '.join(sorted(waiting))}" if waiting else "")

            step.detail(f"waiting for {', '.join(sorted(waiting))}")
            await self.watch(_all(ready(service, process) for service, process in processes))
            step.done(", ".join(service if count == 1 else f"{count} {service}s" for service, count in wanted.items()))

    async def _until_ready(self, service: str, process: Process) -> None:
        answers = service == "baseline" or self.counts.get("verifier", 0) > 0
        await self._services.until_ready(service, process, answers=answers)

    async def _stop_all(self) -> None:
        """Stop the services in an order that lets running work end."""
        self._services.end_watching()
        with self._progress.step("stopping the services") as step:
            for service in STOP_ORDER:
                await asyncio.gather(*(self.stop(process) for process in self.processes(service)))
            step.done("services stopped")

    async def _delete_namespace(self) -> None:
        """Remove this run's namespace from given brokers, which outlive it."""
        if self.brokers.given:
            with suppress(OSError, AMQPError, RedisError):
                await delete_namespace(self.brokers.amqp_url, self.brokers.redis_url, self.namespace, self.brokers.tls)


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run everything concurrently; the first error cancels the rest."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
