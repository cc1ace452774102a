"""A scenario: target, verifiers, devices, acceptance, promises and requests of a simulated fleet."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from services.drafter.core.profile import HardwareProfile, LinkProfile
from services.tools.bench.load.core.distributions import (
    Amount,
    Mixture,
    Positive,
    WeightedPart,
    WorkloadPart,
    dealt,
    draw,
    one_of,
)
from shared.errors import SettingsError
from shared.messages import Name
from shared.slo import Promise
from shared.twin.profile import problems_in
from shared.twin.spec import Acceptance

MOST_TOKENS = 1 << 20
"""Longest prompt, and longest answer, in tokens."""


class RequestClass(WeightedPart, Promise):
    """A class of requests: its SLO, and the lengths of its prompts and answers in tokens."""

    name: Name
    prompt_tokens: Mixture
    output_tokens: Mixture


class DeviceShare(WeightedPart):
    """A share of the devices, with a hardware profile."""

    profile: Annotated[str, Field(min_length=1)]


class DeviceLink(WorkloadPart):
    """The link of every device, instead of that of its hardware profile."""

    uplink: LinkProfile
    downlink: LinkProfile


class Departure(WorkloadPart):
    """Devices that vanish at one moment, in the middle of their requests. These requests do not count."""

    share: Annotated[float, Field(gt=0, le=1)]
    at_s: Amount
    notice_s: Amount = 3.0
    """Time until the services give up the session of a device that has vanished."""


class Crowd(WorkloadPart):
    """Devices that join during the simulation, and stay."""

    factor: Annotated[float, Field(gt=1, le=100)]
    """Devices afterwards / devices before."""
    at_s: Amount
    over_s: Amount = 5.0
    """Time over which they join, evenly."""


class Autoscaling(WorkloadPart):
    """The rule by which Kubernetes starts and stops verifiers, of which `verifiers` is the least number.

    Arms that serve centrally lack the scheduler's metrics and keep their number.
    """

    most: Annotated[int, Field(ge=1, le=1000)]
    start_s: Positive = 60.0
    """Time from the decision to start a verifier until it serves."""


class Factors(WorkloadPart):
    """Factors on the figures of a scenario and its files, for sweeps; 1 leaves them as they are."""

    slo: Positive = 1.0
    """On TTFT and TPOT of all classes."""
    prompts: Positive = 1.0
    """On the lengths of prompts."""
    delay: Amount = 1.0
    """On delay and jitter of the links."""
    drafting: Positive = 1.0
    """On the speed of the devices' draft models."""
    efficiency: Positive = 1.0
    """On the efficiencies of the target's arithmetic and bandwidth, which stay at most 1."""


class Scenario(WorkloadPart):
    """A scenario's file."""

    title: str
    target: Annotated[str, Field(min_length=1)]
    """A shipped target profile, or the path of a TOML file."""
    verifiers: Annotated[int, Field(ge=1, le=1000)] = 1
    verifier_speeds: Annotated[list[Positive], Field(min_length=1)] = Field(default_factory=lambda: [1.0])
    """Speeds of the verifiers against the target's profile, dealt out in turn."""
    autoscaling: Autoscaling | None = None
    departure: Departure | None = None
    crowd: Crowd | None = None
    devices: Annotated[list[DeviceShare], Field(min_length=1)]
    link: DeviceLink | None = None
    hop_ms: Amount = 0.5
    """Time of a message between two services, RabbitMQ included."""
    acceptance: Acceptance = Acceptance()
    trace: Annotated[str, Field(min_length=1)] | None = None
    """A shipped trace, or the path of one that `wisp trace` made: its draft tokens instead of random ones. `acceptance`
    has no effect then."""
    experience_rounds: Annotated[int, Field(ge=0, le=10_000)] = 30
    """Rounds that each device has drafted before the simulation begins."""
    draft_length: Annotated[int, Field(ge=1, le=64)] = 8
    """Longest draft."""
    server_draft_ms: Amount = 1.5
    """One draft step for all sessions on the server's own accelerator: the colocated arm's."""
    classes: Annotated[list[RequestClass], Field(min_length=1)]
    think_s: Mixture
    """Pause between an answer and the same device's next request."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    prefill_tokens: Annotated[int, Field(ge=1)] = 128
    """Most prompt tokens in a step of the arms that serve centrally."""
    max_batch_ms: Positive = 400.0
    """Longest predicted time of a batch of the suite's scheduler."""
    factors: Factors = Factors()

    @model_validator(mode="after")
    def _one_name_each(self) -> Scenario:
        for what, names in (("class", [c.name for c in self.classes]), ("device", [d.profile for d in self.devices])):
            if len(set(names)) < len(names):
                raise ValueError(f"each {what} needs a name of its own (given: {', '.join(names)})")
        if self.autoscaling is not None and self.autoscaling.most < self.verifiers:
            raise ValueError(f"autoscaling.most is less than verifiers, which is {self.verifiers}; raise it")
        return self

    def speed_of(self, verifier: int) -> float:
        """Return the speed of a verifier, counted from 0."""
        return self.verifier_speeds[verifier % len(self.verifier_speeds)]

    @property
    def total_speed(self) -> float:
        """Speed of all verifiers together."""
        return sum(self.speed_of(number) for number in range(self.verifiers))

    def request(self, seed: int, session: int, number: int) -> SimulatedRequest:
        """Return request `number` of a session. It depends on these numbers and the scenario only."""
        rng = random.Random(f"{seed}/{session}/{number}")
        of_class = one_of(self._scaled_classes, rng)
        return SimulatedRequest(
            session=session,
            number=number,
            of_class=of_class,
            prompt_tokens=_length(
                of_class.name, "prompt_tokens", self.factors.prompts * draw(of_class.prompt_tokens, rng)
            ),
            output_tokens=_length(of_class.name, "output_tokens", draw(of_class.output_tokens, rng)),
            think_s=draw(self.think_s, rng),
            seed=rng.getrandbits(48),
        )

    @cached_property
    def _scaled_classes(self) -> list[RequestClass]:
        by = self.factors.slo
        return [
            one
            if one.slo is None
            else one.model_copy(update={"ttft_ms": one.slo.ttft_ms * by, "tpot_ms": one.slo.tpot_ms * by})
            for one in self.classes
        ]

    def link_of(self, hardware: HardwareProfile) -> DeviceLink:
        """Return the link of a device with this hardware."""
        of = self.link or hardware
        by = self.factors.delay
        return DeviceLink(uplink=_slower(of.uplink, by), downlink=_slower(of.downlink, by))

    def hardware(self, session: int) -> str:
        """Return a session's hardware profile, dealt out so that any number of sessions is close to the shares."""
        return dealt([(device.profile, device.weight) for device in self.devices], self._dealt, session)

    @cached_property
    def _dealt(self) -> list[str]:
        return []


@dataclass(frozen=True)
class SimulatedRequest:
    """One request of a device."""

    session: int
    number: int
    of_class: RequestClass
    prompt_tokens: int
    output_tokens: int
    think_s: float
    seed: int
    """Seed of its draft tokens, the same in every arm."""


def _slower(link: LinkProfile, by: float) -> LinkProfile:
    return LinkProfile(delay_ms=link.delay_ms * by, jitter_ms=link.jitter_ms * by)


def _length(class_name: str, field: str, drawn: float) -> int:
    """Return a length in tokens. Raises SettingsError if it is too long for a simulation."""
    if drawn > MOST_TOKENS:
        raise SettingsError(
            f"class {class_name}: {field} of {drawn:.3g} was drawn, and a simulation takes {MOST_TOKENS:,} at most; "
            "bound the distribution with high"
        )
    return max(1, round(drawn))


def parse_scenario(text: str, name: str, changes: dict[str, Any] | None = None) -> Scenario:
    """Parse a YAML file. Raises SettingsError.

    name: of the file, for errors. changes: values that replace the file's, by dotted path. The title names them, unless
    they replace it.
    """
    try:
        given = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise SettingsError(f"scenario {name} is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise SettingsError(f"scenario {name} is no mapping of fields; see the shipped scenarios")
    for path, value in (changes or {}).items():
        _set(given, path.split("."), value, name)
    if changes and "title" not in changes and isinstance(title := given.get("title"), str):
        given["title"] = f"{title}; changed: {', '.join(f'{path}={value}' for path, value in changes.items())}"
    try:
        return Scenario.model_validate(given)
    except ValidationError as error:
        raise SettingsError(f"scenario {name}: {problems_in(error)}") from error


def _set(fields: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    *above, last = path
    for step in above:
        fields = fields.setdefault(step, {})
        if not isinstance(fields, dict):
            raise SettingsError(f"scenario {name} has no field {'.'.join(path)}")
    fields[last] = value
