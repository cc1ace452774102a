"""The ways of serving to compare, and the settings of each. `campaign` starts them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import get_args

from services.baseline.settings import Baseline
from services.scheduler.core.policies import POLICIES, PolicyPart
from services.tools.bench.load.workload import EmulatedHardware
from services.tools.local.service_commands import Serving
from shared.errors import SettingsError

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
NAMES = (*BASELINES, *POLICIES)
PARTS: tuple[str, ...] = get_args(PolicyPart)
THIS_MACHINE = "none"
"""Hardware profile that emulates nothing."""
Environment = dict[str, str]


@dataclass(frozen=True)
class Arm:
    """One way of serving."""

    name: str
    """A baseline, or a policy of the suite's scheduler, with the parts to leave out after a slash."""

    @property
    def serving(self) -> Serving:
        """The suite or a baseline."""
        return next((baseline for baseline in BASELINES if baseline == self.name), "wisp")

    @property
    def base(self) -> str:
        """The policy, without the parts to leave out."""
        return self.name.partition("/")[0]

    @property
    def without(self) -> list[str]:
        """Parts of the policy to leave out."""
        return [part for part in self.name.partition("/")[2].split(",") if part]

    def scheduler(self) -> Environment:
        """Return the scheduler's settings."""
        return {"WISP_POLICY": self.base, "WISP_WITHOUT": json.dumps(self.without)}

    def drafter(self, hardware: EmulatedHardware) -> Environment:
        """Return the settings of a drafter with this hardware."""
        env = {"WISP_POOL": hardware.name}
        if hardware.name != THIS_MACHINE:
            env["WISP_DEVICE_PROFILE"] = hardware.name
        policy = POLICIES.get(self.base)
        if policy is not None and policy.fixed_draft is not None:
            env |= {"WISP_STOP_RULE": "fixed", "WISP_DRAFT_LENGTH": str(policy.fixed_draft)}
        return env


def arms_of(text: str) -> list[Arm]:
    """Parse a comma-separated list of arms. Parts to leave out follow their arm, as in `sled,wisp+/trimming,price`.

    Raises SettingsError.
    """
    names: list[str] = []
    for word in (part.strip() for part in text.split(",")):
        base, slash, part = word.partition("/")
        if base in NAMES and (not slash or part in PARTS):
            names.append(word)
        elif word in PARTS and names and "/" in names[-1]:
            names[-1] += f",{word}"
        elif word:
            raise SettingsError(
                f"{word!r} is no arm; there are {', '.join(NAMES)}, and {' and '.join(filter(_has_parts, NAMES))} "
                f"without some of {', '.join(PARTS)}, written as wisp+/trimming,price"
            )
    if wrong := [name for name in names if "/" in name and not _has_parts(name.partition("/")[0])]:
        raise SettingsError(f"{wrong[0]!r}: only {' and '.join(filter(_has_parts, NAMES))} have parts to leave out")
    if not names:
        raise SettingsError(f"no arm is named; there are {', '.join(NAMES)}")
    return [Arm(name) for name in dict.fromkeys(names)]


def _has_parts(name: str) -> bool:
    """Return whether an arm is a policy with parts that can be left out."""
    return name in POLICIES and bool(POLICIES[name].parts)
