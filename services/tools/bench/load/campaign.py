"""A campaign: one arm after the other, each measured at its points on one running stack."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

from services.drafter.core.profile import LinkProfile
from services.drafter.link import load_profile
from services.tools.bench.load.arms import THIS_MACHINE, Arm, Environment
from services.tools.bench.load.client import LoadClient, http_client
from services.tools.bench.load.core.measures import Window, measure
from services.tools.bench.load.core.record import RequestRecord
from services.tools.bench.load.core.requests import LoadRequest, RequestSource, first_number
from services.tools.bench.load.core.results import LoadResults, MeasuredPoint
from services.tools.bench.load.core.search import AIMS, most_points, next_sessions
from services.tools.bench.load.drive import PointRun
from services.tools.bench.load.lateness import EmulationLog
from services.tools.bench.load.observe import BatchObserver, observing
from services.tools.bench.load.workload import EmulatedHardware, Workload
from services.tools.local.namespace import delete_namespace
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack

START_S = 45.0
"""Approximate time to start and stop a stack, for the estimate of the duration."""
DRAIN_SHARE = 0.5
"""Approximate share of the longest drain that is needed, for the same estimate."""
SETTLE_S = 2.0
"""Pause between two points, in which cancelled requests leave the services."""
THREADS = 1
"""CPU threads of the target, in every arm."""
GIVEN = "server"
"""Name of the arm when a running server is measured."""


@dataclass(frozen=True)
class CapacitySearch:
    """The range and the resolution of a search for capacities."""

    first: int
    most: int
    tolerance: float
    aims: Sequence[float] = AIMS
    """Shares of requests that attain, in the order of the searches."""


@dataclass(frozen=True)
class LoadPlan:
    """The arms, points and requests to measure."""

    arms: Sequence[Arm]
    sessions: Sequence[int]
    search: CapacitySearch | None
    repeats: int
    """Measurements of each number of sessions."""
    window: Window
    workload: Workload
    requests: RequestSource

    @property
    def points(self) -> int:
        """Points of an arm; with a search, about the most."""
        found = len(self.sessions)
        if self.search is not None:
            found += most_points(self.search.first, self.search.most, self.search.tolerance)
        return found * self.repeats

    @property
    def about_s(self) -> float:
        """Approximate duration of the campaign."""
        point_s = self.window.end_s + DRAIN_SHARE * self.window.drain_s + SETTLE_S
        starts = self.repeats * START_S * bool(self.arms)
        return max(1, len(self.arms)) * (starts + self.points * point_s)


@dataclass(frozen=True)
class ArmSettings:
    """Settings that all arms share."""

    target: Path
    dtype: str
    cache_tokens: int
    admission: bool
    device_profiles: Mapping[str, Path] = field(default_factory=dict)
    """Files of hardware profiles by name, for those that are not shipped."""
    env_of: Mapping[str, Environment] = field(default_factory=dict)
    """Further variables by service."""

    @property
    def env(self) -> Environment:
        """The settings as environment variables of every service."""
        return {
            "WISP_DTYPE": self.dtype,
            "WISP_THREADS": str(THREADS),
            "WISP_CACHE_TOKENS": str(self.cache_tokens),
            "WISP_ADMISSION": str(self.admission).lower(),
        }


@dataclass
class Campaign:
    """A campaign, and its results so far."""

    plan: LoadPlan
    progress: Progress
    show: Callable[[MeasuredPoint], None] = lambda point: None
    """Called with each point, as soon as it is measured."""
    results: LoadResults = field(init=False)
    records: list[tuple[str, int, int, RequestRecord]] = field(default_factory=list)
    """Every request, with its arm, sessions and repeat."""
    asked: dict[tuple[int, int], LoadRequest] = field(default_factory=dict)
    _emulation: EmulationLog | None = None
    """Observer of the running stack; None for a server that this campaign did not start."""

    def __post_init__(self) -> None:
        self.results = LoadResults(
            window=self.plan.window, aims=list(self.plan.search.aims) if self.plan.search else []
        )

    async def run_arms(self, settings: ArmSettings) -> None:
        """For each repeat, start a stack for each arm in turn and measure it.

        The arms take turns so that a slow spell of a shared machine affects all of them.
        """
        for repeat in range(self.plan.repeats):
            for arm in self.plan.arms:
                async with self._started(arm, settings) as stack:
                    self._emulation = EmulationLog(stack.folder)
                    if arm.serving == "wisp":
                        async with observing(stack.brokers.amqp_url, stack.namespace, stack.brokers.tls) as observer:
                            await stack.watch(self._measure_all(arm.name, stack.url, observer, repeat, pools=True))
                    else:
                        uplinks = self._uplinks(settings)
                        await stack.watch(self._measure_all(arm.name, stack.url, None, repeat, uplinks=uplinks))

    async def run_server(self, url: str, *, pools: bool) -> None:
        """Measure a running server."""
        for repeat in range(self.plan.repeats):
            await self._measure_all(GIVEN, url, None, repeat, pools=pools)

    @asynccontextmanager
    async def _started(self, arm: Arm, settings: ArmSettings) -> AsyncIterator[Stack]:
        """Start an arm's stack; the suite gets a drafter for each hardware profile.

        Each stack has its own brokers, so that no brokers run beside a baseline.
        """
        options: dict[str, Any] = {
            "serving": arm.serving,
            "target": settings.target,
            "namespace": f"bench-{token_hex(4)}",
            "env": settings.env,
            "progress": self.progress,
        }
        devices = self.plan.workload.devices if arm.serving == "wisp" else []
        env_of = {service: dict(env) for service, env in settings.env_of.items()}
        if devices:
            env_of["scheduler"] = env_of.get("scheduler", {}) | arm.scheduler()
            env_of["drafter"] = env_of.get("drafter", {}) | self._drafter(arm, devices[0], settings)
        options["env_of"] = env_of
        async with AsyncExitStack() as ends:
            stack = await ends.enter_async_context(Stack("bench-load", **options))
            if devices and stack.brokers.given:
                own = stack.brokers
                ends.push_async_callback(delete_namespace, own.amqp_url, own.redis_url, stack.namespace, own.tls)
            for device in devices[1:]:
                with self.progress.step(f"starting the drafter of {device.name}") as step:
                    await stack.start("drafter", env=self._drafter(arm, device, settings))
                    step.done(f"drafter of {device.name}")
            yield stack

    @staticmethod
    def _drafter(arm: Arm, device: EmulatedHardware, settings: ArmSettings) -> Environment:
        """Return the settings of an arm's drafter for a device."""
        env = arm.drafter(device)
        if (file := settings.device_profiles.get(device.name)) is not None:
            env["WISP_DEVICE_PROFILE"] = str(file)
        return env

    def _uplinks(self, settings: ArmSettings) -> dict[str, LinkProfile]:
        """Return the uplink of each hardware profile to the server. Raises SettingsError."""
        names = [device.name for device in self.plan.workload.devices if device.name != THIS_MACHINE]
        wanted = {name: str(settings.device_profiles.get(name, name)) for name in names}
        return {name: profile.uplink for name, file in wanted.items() if (profile := load_profile(file)) is not None}

    async def _measure_all(
        self,
        arm: str,
        url: str,
        observer: BatchObserver | None,
        repeat: int,
        *,
        pools: bool = False,
        uplinks: Mapping[str, LinkProfile] | None = None,
    ) -> None:
        async with http_client(url) as http:
            client = await LoadClient.connect(http, pools=pools, uplinks=uplinks)
            for sessions in self.plan.sessions:
                await self._measure(arm, client, observer, sessions, repeat)
            if (search := self.plan.search) is None or repeat < self.plan.repeats - 1:
                return
            for aim in search.aims:
                while (found := self._next(arm, aim, search)) is not None:
                    for repeat in range(self.plan.repeats):
                        await self._measure(arm, client, observer, found, repeat)

    def _next(self, arm: str, aim: float, search: CapacitySearch) -> int | None:
        tried = self.results.tried(arm)
        return next_sessions(tried, aim, first=search.first, most=search.most, tolerance=search.tolerance)

    async def _measure(
        self, arm: str, client: LoadClient, observer: BatchObserver | None, sessions: int, repeat: int
    ) -> None:
        plan = self.plan
        if observer is not None:
            observer.take()
        if self._emulation is not None:
            self._emulation.take()
        with self.progress.step(f"{arm}, {sessions} sessions") as step:
            first = first_number(sessions, repeat)
            point = PointRun(client, plan.workload, plan.requests, sessions, first, plan.window, step.detail)
            lag = await point.run()
            self.records += [(arm, sessions, repeat, record) for record in point.records]
            self.asked |= {(request.session, request.number): request for request in point.asked}
            costs, batches = (observer.costs, observer.take()) if observer else ([], [])
            measures = measure(point.records, plan.window, costs, batches)
            late = self._emulation.take() if self._emulation is not None else None
            measured = MeasuredPoint(
                arm=arm, sessions=sessions, repeat=repeat, measures=measures, lag=lag, costs=costs, late_share=late
            )
            self.results.points.append(measured)
            self.show(measured)
            step.done(
                f"{arm}, {sessions} sessions: {measures.attained} of {measures.requests} requests attained, "
                f"{measures.goodput:.1f} tokens/s of them"
            )
        await asyncio.sleep(SETTLE_S)
