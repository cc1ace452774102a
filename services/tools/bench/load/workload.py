"""A workload: distributions of requests and arrivals, and the requests drawn from them.

Request k of session i depends only on (seed, i, k) and on the workload, so every arm gets the same requests. The
numbers k of a measured point start at its own `first_number`, so that no prefix cache holds a prompt of an earlier
point.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from functools import cached_property
from importlib import resources
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from services.tools.bench.load.core.distributions import (
    Mixture,
    Positive,
    WeightedPart,
    WorkloadPart,
    dealt,
    draw,
    one_of,
)
from services.tools.bench.load.core.requests import LoadRequest
from services.tools.bench.load.prompts import conversation
from services.tools.training.prompts import RAW_KIND, corpus
from shared.errors import SettingsError, in_words
from shared.runtime.settings import NAME_PATTERN
from shared.slo import Promise


class ArrivalProcess(WorkloadPart):
    """The process by which requests arrive."""

    process: Literal["closed", "poisson", "gamma"] = "closed"
    rate: Positive = 0.3
    """Requests per second and session; used by the open processes."""
    burstiness: Positive = 4.0
    """Square of the coefficient of variation of the gaps; used by `gamma`."""


class SloClass(WeightedPart, Promise):
    """A class of requests with the same SLO. Without an SLO, the server chooses it by the tier."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    tier: str | None = None


class EmulatedHardware(WeightedPart):
    """A hardware profile, and the pool of drafters that emulate it; both have the same name."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]


class Temperature(WeightedPart):
    """A sampling temperature."""

    value: Annotated[float, Field(ge=0, le=2)]


class Workload(WorkloadPart):
    """The distributions and the seed. `default.toml` explains each field."""

    seed: Annotated[int, Field(ge=0)]
    kinds: Annotated[list[str], Field(min_length=1)]
    held_out: bool
    ignore_eos: bool
    arrivals: ArrivalProcess
    think_s: Mixture
    prompt_tokens: Mixture
    output_tokens: Mixture
    classes: Annotated[list[SloClass], Field(min_length=1)]
    devices: Annotated[list[EmulatedHardware], Field(min_length=1)]
    temperatures: Annotated[list[Temperature], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Workload:
        known = {t.kind for t in corpus().templates.values() if t.held_out == self.held_out and t.kind != RAW_KIND}
        if unknown := sorted(set(self.kinds) - known):
            raise ValueError(f"no kinds of text: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        for what, names in (("class", [c.name for c in self.classes]), ("device", [d.name for d in self.devices])):
            if len(set(names)) < len(names):
                raise ValueError(f"each {what} needs a name of its own (given: {', '.join(names)})")
        return self

    def request(self, session: int, number: int) -> LoadRequest:
        """Return request `number` of a session."""
        rng = self._rng(session, number)
        of_class = one_of(self.classes, rng)
        return LoadRequest(
            session=session,
            number=number,
            messages=conversation(rng.getrandbits(48), draw(self.prompt_tokens, rng), self.kinds, self.held_out),
            max_tokens=max(1, round(draw(self.output_tokens, rng))),
            temperature=one_of(self.temperatures, rng).value,
            seed=rng.getrandbits(31),
            ignore_eos=self.ignore_eos,
            service_class=of_class.name,
            tier=of_class.tier,
            slo=of_class.slo,
            device=self.hardware(session),
            think_s=draw(self.think_s, rng),
        )

    def hardware(self, session: int) -> str:
        """Return a session's hardware profile, dealt out so that any number of sessions is close to the mixture."""
        return dealt([(device.name, device.weight) for device in self.devices], self._dealt, session)

    @cached_property
    def _dealt(self) -> list[str]:
        return []

    def starts_s(self, sessions: int, within_s: float) -> list[float]:
        """Return the time of each session's first request in a closed loop, spread over `within_s`."""
        return [self._rng(session, "start").uniform(0.0, within_s) for session in range(sessions)]

    def arrivals_s(self, sessions: int, first: int) -> Iterator[tuple[float, int, int]]:
        """Yield time, session and number of each arrival of an open process, without end. Sessions take turns."""
        rng, at_s, count = self._rng(sessions, f"arrivals/{first}"), 0.0, 0
        shape = 1.0 if self.arrivals.process == "poisson" else 1.0 / self.arrivals.burstiness
        mean_s = 1.0 / (self.arrivals.rate * sessions)
        while True:
            at_s += rng.gammavariate(shape, mean_s / shape)
            yield at_s, count % sessions, first + count // sessions
            count += 1

    def _rng(self, session: int, what: int | str) -> random.Random:
        return random.Random(f"{self.seed}/{session}/{what}")


def default_text() -> str:
    """Return the text of the packaged workload file."""
    return (resources.files(__package__) / "default.toml").read_text("utf-8")


def workload_of(text: str, seed: int | None = None) -> Workload:
    """Parse the text of a TOML file; the packaged workload supplies missing fields. Raises SettingsError."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the workload is not TOML: {error}") from error
    fields = tomllib.loads(default_text()) | given | ({} if seed is None else {"seed": seed})
    try:
        return Workload.model_validate(fields)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(step) for step in one['loc']) or 'workload'}: {in_words(one)}"
            for one in error.errors(include_url=False)
        ]
        raise SettingsError(
            "the workload cannot be used: "
            + "; ".join(problems)
            + "; `wisp bench load --print-workload` shows a full one"
        ) from error
