"""A device that is emulated: how long it drafts, and how far away it is. Pure.

Each session of a drafter stands for a device of its own. Profiles are TOML files; those in `devices` say of every
figure where it comes from.
"""

from __future__ import annotations

import tomllib
from random import Random
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.drafter.core.draft import Draft
from shared.errors import SettingsError

MOST_JITTER = 10.0
"""Largest jitter, in units of its mean: a draw exceeds that once in 22,000 times."""

Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Link(_Part):
    """One direction of the way between the device and the suite."""

    delay_ms: Milliseconds
    jitter_ms: Milliseconds = 0.0
    """Mean of what comes on top of it for each message: exponentially distributed, as waiting in a queue is."""


class DraftTimes(_Part):
    """How long the device needs for drafts by a model. Copied tokens take no time."""

    step_ms: Milliseconds
    """One step of the draft model, which gives one draft token."""
    prompt_ms: Milliseconds = 0.0
    """Each further committed token that is computed along with a step: of the prompt, or of the last round."""


class DeviceProfile(_Part):
    """A device and its network."""

    description: str = ""
    draft: DraftTimes
    uplink: Link
    downlink: Link

    def steps_ms(self, steps: int) -> float:
        """Time of so many steps."""
        return steps * self.draft.step_ms

    def draft_ms(self, draft: Draft) -> float:
        """Time to make this draft, the committed tokens before it included."""
        return self.steps_ms(sum(draft.steps.values())) + max(0, draft.computed - 1) * self.draft.prompt_ms

    def ahead_ms(self, draft: Draft) -> float:
        """Time to make this draft ahead: one step more, which computes the last token of the draft before it."""
        return self.draft_ms(draft) + self.draft.step_ms


class Travel:
    """When the messages of one direction arrive: never before an earlier one, jitter or not.

    The same `seed` gives the same jitter.
    """

    def __init__(self, link: Link, seed: str) -> None:
        self._link = link
        self._random = Random(seed)
        self._latest_ms = float("-inf")

    def arrival_ms(self, sent_ms: float) -> float:
        """Arrival of the next message, on the clock that `sent_ms` is read from."""
        jitter = min(MOST_JITTER, self._random.expovariate(1.0)) * self._link.jitter_ms
        self._latest_ms = max(self._latest_ms, sent_ms + self._link.delay_ms + jitter)
        return self._latest_ms


def parse(text: str, name: str) -> DeviceProfile:
    """The profile in a TOML file. name: of the file, for errors. Raises SettingsError."""
    try:
        return DeviceProfile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"device profile {name} is not TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {_words(e['type'], e['msg'])}" for e in error.errors())
        raise SettingsError(
            f"device profile {name}: {problems}. It has draft (step_ms, prompt_ms), uplink and downlink (delay_ms, "
            "jitter_ms), all in milliseconds"
        ) from error


def _words(kind: str, message: str) -> str:
    return {"missing": "missing", "extra_forbidden": "no such key"}.get(kind, message)
