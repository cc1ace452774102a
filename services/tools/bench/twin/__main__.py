"""`wisp bench twin`: the real suite on a twin, and the simulator, under the same load.

A scenario of `wisp simulate` gives target, devices, acceptance and requests. Each arm is measured twice at each number
of devices: on the suite with emulated models, in real time, and in the simulator, in virtual time. The target's
profile, the seeds, the lengths of prompts and answers and each request's draft tokens are the same. The table has both
figures and the difference. A point is marked where this machine was too slow to keep the emulated times.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from services.tools.bench.load.arms import arms_of
from services.tools.bench.load.campaign import ArmSettings, Campaign, LoadPlan
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.results import MeasuredPoint, notes
from services.tools.bench.load.point_options import DrainOption, MeasuredOption, WarmUpOption
from services.tools.bench.support.options import NameOption, run_program, whole_numbers
from services.tools.bench.support.report import conclude, machine, records, table, terminal
from services.tools.bench.twin.core.comparison import AGREEMENT, COLUMNS, compared
from services.tools.bench.twin.load import load_of, service_settings, write_devices
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.progress import ConsoleProgress, Progress
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_target
from services.tools.simulator.arms import SCENARIOS, SimulatedPoint, read, simulate
from services.tools.simulator.core.scenario import Scenario, parse_scenario
from shared.twin.files import trace_path
from shared.twin.folder import write_twin

ARMS = "centralized,edf,wisp+/runs"
SESSIONS = "2,6,12"


def main(
    scenario: Annotated[str, typer.Argument(help="Scenario of `wisp simulate`: a name or a YAML file.")] = "paper-a100",
    arms: Annotated[str, typer.Option(help="Arms to compare, as for `wisp bench load`.")] = ARMS,
    sessions: Annotated[str, typer.Option(help="Numbers of devices.")] = SESSIONS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the requests.")] = 1,
    warm_up: WarmUpOption = 20.0,
    measured: MeasuredOption = 60.0,
    drain: DrainOption = 20.0,
    hop_ms: Annotated[
        float, typer.Option(min=0, help="Simulated time of a message between services: that of this machine.")
    ] = 2.0,
    target: TargetOption = None,
    name: NameOption = "twin",
) -> None:
    """Compare the suite on a twin with the simulator."""
    with errors_shown():
        console = terminal()
        progress = ConsoleProgress(console)
        spec = parse_scenario(read(scenario, SCENARIOS, ".yaml", "scenario"), scenario, {"hop_ms": hop_ms})
        window = Window(warm_up_s=warm_up, measure_s=measured, drain_s=drain)
        tokenizer = prepare_target(target or LocalSettings().target, progress)
        plan = TwinPlan(spec, arms, whole_numbers("--sessions", sessions, 1), seed, window)
        with TemporaryDirectory(prefix="wisp-twin-") as made:
            twin, simulated = plan.measure(tokenizer, Path(made), progress)
        rows = [compared(*pair, measured) for pair in zip(twin.results.points, simulated, strict=True)]
        console.print(table(f"{spec.title}: twin, simulator and difference in %", COLUMNS, rows))
        conclude(
            console,
            name,
            {
                "facts": {"scenario": scenario, "seed": seed, "hop_ms": hop_ms, **machine()},
                "notes": [
                    f"aim: differences of at most {AGREEMENT:.0%}; batch is the mean number of jobs of a step, late the"
                    " late share of the emulated time",
                    *notes(twin.results),
                ],
                "rows": records(COLUMNS, rows),
                "twin": twin.results.model_dump(mode="json"),
                "simulator": [point.model_dump(mode="json") for point in simulated],
            },
        )


class TwinPlan:
    """The points that are measured on a twin and in the simulator."""

    def __init__(self, scenario: Scenario, arms: str, sessions: list[int], seed: int, window: Window) -> None:
        self._scenario = scenario
        self._arms = arms_of(arms)
        self._sessions = sessions
        self._seed = seed
        self._window = window

    def measure(self, tokenizer: Path, made: Path, progress: Progress) -> tuple[Campaign, list[MeasuredPoint]]:
        """Measure all points; return the twin's campaign, and the simulator's points in the same order.

        tokenizer: folder of the model whose tokenizer the twin gets. made: a folder for the twin. Raises WispError.
        """
        spec = self._scenario
        folder = write_twin(
            spec.target,
            tokenizer,
            made / "twin",
            spec.acceptance,
            trace=trace_path(spec.trace) if spec.trace else None,
            draft_step_ms=spec.server_draft_ms,
        ).path
        workload, requests = load_of(spec, self._seed, folder)
        plan = LoadPlan(self._arms, self._sessions, None, 1, self._window, workload, requests)
        campaign = Campaign(plan, progress)
        settings = ArmSettings(
            folder,
            "bfloat16",
            1024,
            admission=False,
            device_profiles=write_devices(spec, made),
            env_of=service_settings(spec),
        )
        run(lambda: campaign.run_arms(settings))
        simulated = []
        with progress.step("simulating the same") as step:
            for arm in self._arms:
                for sessions in self._sessions:
                    step.detail(f"{arm.name}, {sessions} sessions")
                    point = SimulatedPoint(arm, sessions, 0, self._seed)
                    simulated.append(simulate(point, spec, self._window)[0])
        return campaign, simulated


if __name__ == "__main__":
    run_program(main, "wisp bench twin")
