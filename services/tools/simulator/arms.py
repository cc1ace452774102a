"""The arms of a simulation: one point of an arm, from a scenario to its measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.drafter.link import load_profile
from services.tools.bench.load.arms import Arm
from services.tools.bench.load.core.measures import Window, lag_of, measure
from services.tools.bench.load.core.record import RequestRecord
from services.tools.bench.load.core.requests import first_number
from services.tools.bench.load.core.results import MeasuredPoint
from services.tools.simulator.core.central import CentralWorld
from services.tools.simulator.core.drafts import SyntheticDrafts
from services.tools.simulator.core.scenario import Scenario
from services.tools.simulator.core.suite import SuiteWorld
from services.tools.simulator.core.world import SimulatedHardware, World
from services.tools.simulator.traced import traced_drafts
from shared.errors import SettingsError
from shared.twin.files import load_target
from shared.twin.profile import RooflineProfile, TargetProfile

SCENARIOS = Path(__file__).parent / "scenarios"


@dataclass(frozen=True)
class SimulatedPoint:
    """One point: an arm at a number of sessions, with a seed of its own for each repeat."""

    arm: Arm
    sessions: int
    repeat: int
    seed: int


def shipped(folder: Path, suffix: str) -> list[str]:
    """Return the names of the shipped files of a folder."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))


def read(wanted: str, folder: Path, suffix: str, what: str) -> str:
    """Return the text of a shipped file by name, or of a file by path. Raises SettingsError."""
    path = folder / f"{wanted}{suffix}" if wanted in shipped(folder, suffix) else Path(wanted)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"{what} {wanted!r} cannot be read ({reason}); give the path of a {suffix} file, or one of "
            f"{', '.join(shipped(folder, suffix))}"
        ) from error


def target_of(scenario: Scenario) -> TargetProfile:
    """Return the scenario's target. Raises SettingsError."""
    target = load_target(scenario.target)
    if scenario.factors.efficiency == 1:
        return target
    if not isinstance(target, RooflineProfile):
        raise SettingsError(f"target {scenario.target} was measured; factors.efficiency is for a roofline")
    fields = ("arithmetic_efficiency", "bandwidth_efficiency")
    scaled = {field: min(1.0, scenario.factors.efficiency * getattr(target, field)) for field in fields}
    return target.model_copy(update=scaled)


def hardware_of(scenario: Scenario) -> SimulatedHardware:
    """Return the scenario's hardware. Raises SettingsError, and ModelError for a file that is no trace."""
    devices = {}
    for device in scenario.devices:
        profile = load_profile(device.profile)
        assert profile is not None  # only an empty name has none
        draft = profile.draft
        faster = draft.model_copy(update={"step_ms": draft.step_ms / scenario.factors.drafting})
        devices[device.profile] = profile.model_copy(update={"draft": faster})
    drafts = SyntheticDrafts(scenario.acceptance) if scenario.trace is None else traced_drafts(scenario.trace)
    return SimulatedHardware(target_of(scenario), devices, drafts)


def world_of(arm: Arm, scenario: Scenario, hardware: SimulatedHardware, seed: int) -> World:
    """Return the arm's fleet before its start."""
    if arm.serving != "wisp":
        return CentralWorld(scenario, hardware, seed, drafts=arm.serving == "colocated")
    return SuiteWorld(scenario, hardware, seed, policy=arm.base, without=arm.without)


def simulate(point: SimulatedPoint, scenario: Scenario, window: Window) -> tuple[MeasuredPoint, list[RequestRecord]]:
    """Run a point; return its measures and the record of every request."""
    world = world_of(point.arm, scenario, hardware_of(scenario), point.seed)
    world.run(point.sessions, window, first_number(point.sessions, 0))
    costs = [world.target.cost_model("verifier")] if point.arm.serving == "wisp" else []
    measured = MeasuredPoint(
        arm=point.arm.name,
        sessions=point.sessions,
        repeat=point.repeat,
        measures=measure(world.records, window, costs, world.batches),
        lag=lag_of([], [], 0.0),
        costs=costs,
        scalings=world.scalings,
    )
    return measured, world.records
