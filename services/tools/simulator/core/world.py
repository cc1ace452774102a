"""The parts that every arm of a simulation has: virtual time, devices that send requests, and their records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any

import simpy

from services.drafter.core.profile import HardwareProfile, LinkDelays
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.record import Ending, RequestRecord
from services.tools.simulator.core.drafts import DraftModel
from services.tools.simulator.core.scenario import Scenario, SimulatedRequest
from shared.messages import Finish, Generate, Measurement, Result, Sampling
from shared.twin.profile import TargetProfile

Process = Generator[simpy.Event, Any, None]

RIGHT, WRONG = 7, 8
"""Token ids: every text repeats `RIGHT`, and a wrong draft token is `WRONG`."""


@dataclass(frozen=True)
class SimulatedHardware:
    """The hardware of a scenario."""

    target: TargetProfile
    devices: dict[str, HardwareProfile]
    drafts: DraftModel


@dataclass
class SimulatedDevice:
    """A device with its hardware and its link. Messages on the link keep their order."""

    name: str
    hardware: HardwareProfile
    uplink: LinkDelays
    downlink: LinkDelays


@dataclass
class ClientRequest:
    """A request in service, and the tokens that its client has received."""

    request: SimulatedRequest
    generate: Generate
    device: SimulatedDevice
    start_ms: float
    done: simpy.Event
    tokens: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    gone: bool = False
    """True once its device has vanished."""

    def record(self, ending: Ending, now_ms: float) -> RequestRecord:
        """Return the request's record, in the load generator's format."""
        return RequestRecord(
            session=self.request.session,
            number=self.request.number,
            service_class=self.request.of_class.name,
            device=self.device.name,
            slo=self.generate.slo,
            start_s=self.start_ms / 1000,
            lag_ms=0.0,
            ending=ending,
            total_ms=now_ms - self.start_ms,
            prompt_tokens=self.request.prompt_tokens,
            tokens=self.tokens,
            arrivals=self.arrivals,
            finish="length" if ending is Ending.COMPLETE else "",
            rounds=self.rounds,
        )


class World(ABC):
    """One arm under a number of sessions, in virtual time. Times are milliseconds."""

    def __init__(self, scenario: Scenario, hardware: SimulatedHardware, seed: int) -> None:
        self.scenario = scenario
        self.target = hardware.target
        self.drafts = hardware.drafts
        self.env = simpy.Environment()
        self.records: list[RequestRecord] = []
        self.batches: list[Measurement] = []
        """Every step of all verifiers."""
        self.scalings: list[tuple[float, int, str]] = []
        """Time in seconds, wanted number of verifiers, and the metric that decided, of each change."""
        self._hardware = hardware
        self._seed = seed
        self._served: list[ClientRequest] = []
        self._gone_ms: dict[int, float] = {}
        """When devices vanish, by session."""

    @property
    def now_ms(self) -> float:
        """The virtual time."""
        return float(self.env.now)

    @abstractmethod
    def serve(self, served: ClientRequest) -> None:
        """Take a request at the server. `deliver` sends its tokens."""

    @abstractmethod
    def give_up(self, served: ClientRequest) -> None:
        """End the request of a device that has vanished."""

    def run(self, sessions: int, window: Window, first: int) -> None:
        """Run a closed loop of sessions until the requests of the window have ended, or for the longest drain.

        first: number of each session's first request.
        """
        end_ms = 1000 * (window.end_s + window.drain_s)
        if (departure := self.scenario.departure) is not None:
            leaving = Random(f"{self._seed}/departure").sample(range(sessions), round(departure.share * sessions))
            self._gone_ms = dict.fromkeys(leaving, 1000 * departure.at_s)
        for session in range(sessions):
            spread = Random(f"{self._seed}/{session}/start").uniform(0.0, 1000 * window.warm_up_s)
            self.env.process(self._client(session, first, window, spread))
        if (crowd := self.scenario.crowd) is not None:
            for session in range(sessions, round(sessions * crowd.factor)):
                spread = Random(f"{self._seed}/{session}/start").uniform(0.0, 1000 * crowd.over_s)
                self.env.process(self._client(session, first, window, 1000 * crowd.at_s + spread))
        while self.now_ms < end_ms:
            if self.now_ms >= 1000 * window.end_s and not self._counted_open(window):
                break
            self.env.run(until=min(end_ms, self.now_ms + 1000))
        for served in self._served:
            if not served.done.triggered:
                self.records.append(served.record(Ending.CUT, self.now_ms))

    def _counted_open(self, window: Window) -> bool:
        self._served = [served for served in self._served if not served.done.triggered]
        return any(window.counts(served.start_ms / 1000) for served in self._served)

    def _client(self, session: int, first: int, window: Window, start_ms: float) -> Process:
        """Send one request after the other from a time on."""
        profile = self.scenario.hardware(session)
        hardware = self._hardware.devices[profile]
        link = self.scenario.link_of(hardware)
        device = SimulatedDevice(
            profile,
            hardware,
            LinkDelays(link.uplink, f"{self._seed}/{session}/up"),
            LinkDelays(link.downlink, f"{self._seed}/{session}/down"),
        )
        yield self.env.timeout(start_ms)
        number = first
        gone_ms = self._gone_ms.get(session, inf)
        while self.now_ms < min(1000 * window.end_s, gone_ms):
            request = self.scenario.request(self._seed, session, number)
            served = ClientRequest(request, _generate(request), device, self.now_ms, self.env.event())
            self._served.append(served)
            arrival_ms = device.uplink.arrival_ms(self.now_ms) + self.scenario.hop_ms
            self.at(arrival_ms, lambda served=served: self.serve(served))  # type: ignore[misc]
            if gone_ms < inf:
                yield served.done | self.env.timeout(gone_ms - self.now_ms)
                if not served.done.triggered:
                    self._vanish(served)
                    return
            else:
                yield served.done
            self.records.append(served.record(Ending.COMPLETE, self.now_ms))
            number += 1
            yield self.env.timeout(1000 * request.think_s)

    def _vanish(self, served: ClientRequest) -> None:
        """Remove a device; the services notice it later."""
        departure = self.scenario.departure
        assert departure is not None
        served.gone = True
        self._served.remove(served)
        self.at(self.now_ms + 1000 * departure.notice_s, lambda: self.give_up(served))

    def at(self, at_ms: float, happen: Callable[[], None]) -> None:
        """Call `happen` at a time, or now if that has passed."""
        event = self.env.timeout(max(0.0, at_ms - self.now_ms))
        event.callbacks.append(lambda _: happen())

    def deliver(self, served: ClientRequest, result: Result) -> None:
        """Send a result's tokens to the request's client."""
        count, last = len(result.tokens), result.finish is not None
        if not count:
            return

        def arrive() -> None:
            if served.gone:
                return
            served.tokens += count
            served.arrivals.append((self.now_ms - served.start_ms, count))
            if last:
                served.done.succeed()

        self.at(served.device.downlink.arrival_ms(self.now_ms + self.scenario.hop_ms), arrive)


def finish_of(generate: Generate, length: int) -> Finish | None:
    """Return how a session of this length has ended; None if it goes on."""
    return Finish.LENGTH if length >= len(generate.prompt) + generate.max_tokens else None


def _generate(request: SimulatedRequest) -> Generate:
    return Generate(
        session=f"s{request.session}-{request.number}",
        gateway="gateway",
        prompt=[RIGHT] * request.prompt_tokens,
        sampling=Sampling(),
        stop_ids=[],
        max_tokens=request.output_tokens,
        fingerprint="simulated",
        vocab_fingerprint="simulated",
        slo=request.of_class.slo,
        service_class=request.of_class.name,
    )
