"""Hardware profiles: the drafting speed and the link of an emulated device.

Each session of a drafter stands for a device of its own. Profiles are TOML files; the shipped ones, in
`services/drafter/profiles`, give the source of every figure.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from itertools import accumulate, islice
from random import Random
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from services.drafter.core.draft import Draft
from shared.errors import SettingsError, in_words

MOST_JITTER = 10.0
"""Largest jitter, in units of its mean: one draw in 22,000 exceeds it."""

Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _ProfilePart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinkProfile(_ProfilePart):
    """One direction of the link between the device and the suite."""

    delay_ms: Milliseconds
    jitter_ms: Milliseconds = 0.0
    """Mean of the additional delay of each message: exponentially distributed, like the wait in a queue."""


class DraftTimes(_ProfilePart):
    """Times of drafting by a model on the device. Copied tokens take no time."""

    step_ms: Milliseconds
    """One step of the draft model, which gives one draft token."""
    prompt_ms: Milliseconds = 0.0
    """Each further committed token, of the prompt or of the last round, that is computed along with a step."""


class HardwareProfile(_ProfilePart):
    """A device's drafting times and its network."""

    description: str = ""
    draft: DraftTimes
    uplink: LinkProfile
    downlink: LinkProfile

    def steps_ms(self, steps: int) -> float:
        """Return the time of `steps` draft steps."""
        return steps * self.draft.step_ms

    def draft_ms(self, draft: Draft) -> float:
        """Return the time to make a draft, including the committed tokens computed before it."""
        return self.steps_ms(sum(draft.steps.values())) + max(0, draft.computed - 1) * self.draft.prompt_ms

    def made_ahead(self, drafts: Sequence[Draft], elapsed_ms: float) -> int:
        """Return how many of these drafts are prepared, one after another, in this time after a round was sent.

        Its draft's last token takes a step before them.
        """
        ready_ms = accumulate(map(self.draft_ms, drafts), initial=self.draft.step_ms)
        return sum(ms <= elapsed_ms for ms in islice(ready_ms, 1, None))


class LinkDelays:
    """Arrival times of the messages of one direction. Jitter never changes their order.

    The same `seed` gives the same jitter.
    """

    def __init__(self, link: LinkProfile, seed: str) -> None:
        self._link = link
        self._random = Random(seed)
        self._latest_ms = float("-inf")

    def arrival_ms(self, sent_ms: float) -> float:
        """Return the arrival time of the next message, on the clock of `sent_ms`."""
        jitter = min(MOST_JITTER, self._random.expovariate(1.0)) * self._link.jitter_ms
        self._latest_ms = max(self._latest_ms, sent_ms + self._link.delay_ms + jitter)
        return self._latest_ms


def parse_profile(text: str, name: str) -> HardwareProfile:
    """Parse a TOML file. name: of the file, for errors. Raises SettingsError."""
    try:
        return HardwareProfile.model_validate(tomllib.loads(text))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {_problem(e)}" for e in error.errors())
        raise SettingsError(
            f"hardware profile {name}: {problems}. A profile has draft (step_ms, prompt_ms), uplink and downlink "
            "(delay_ms, jitter_ms), all in milliseconds"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and numbers and dates out of range
        raise SettingsError(f"hardware profile {name} is not TOML: {error}") from error


def _problem(one: ErrorDetails) -> str:
    return "no such key" if one["type"] == "extra_forbidden" else in_words(one)
