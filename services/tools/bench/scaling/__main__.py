"""`wisp bench scaling`: throughput by number of verifiers, and the time that a new verifier takes to serve.

A machine cannot show the throughput of more verifiers than it has cores, unless their time is emulated. Each verifier
runs a tiny random model. For every batch it then waits in its model thread until the time has passed that the target
would take on a core of its own (times `--slower`). The target's cost model is measured first, on the target itself, on
one thread. Everything else is real: clients and their streams, services, brokers, the scheduler's decisions. To check
the emulation, one verifier is also measured with the real model and, emulated, at the same speed.

The last table is a load step with the real model: more sessions arrive than one verifier can serve, the rule of
`k8s/components/keda` is applied to the scheduler's metrics (see `core.autoscaling`), and a second verifier starts when
the rule asks for it. Kubernetes adds the time to find a node, to fetch the image, and to probe the pod.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer

from services.tools.bench.load.client import LoadClient, http_client
from services.tools.bench.load.core.measures import Measures, Window, measure
from services.tools.bench.load.core.requests import first_number
from services.tools.bench.load.drive import PointRun
from services.tools.bench.load.point_options import MeasuredOption, WarmUpOption
from services.tools.bench.load.workload import Workload, workload_of
from services.tools.bench.scaling.load_step import load_step
from services.tools.bench.support.options import run_program, target_folder, whole_numbers
from services.tools.bench.support.report import conclude, machine, records, table, terminal
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.progress import ConsoleProgress
from services.tools.local.stack import Stack
from services.verifier.profile import profile
from shared.cost.fit import VerifierFit
from shared.engine import Engine
from shared.errors import SettingsError

WORKLOAD = """
ignore_eos = true
think_s = [{distribution = "constant", value = 0}]
prompt_tokens = [{distribution = "lognormal", median = 50, sigma = 0.6, low = 20, high = 150}]
output_tokens = [{distribution = "uniform", low = 24, high = 48}]
classes = [{name = "all", ttft_ms = %g, tpot_ms = %g}]
devices = [{name = "none"}]
temperatures = [{value = 0}]
"""
CACHE_TOKENS = 32768
COLUMNS = (
    *("tokens/s", "goodput", "attained %", "requests", "TTFT ms", "TPOT ms", "TPOT p90"),
    *("failed", "machine busy %"),
)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
"""Configuration of the model that runs where time is emulated."""


def cost_on_one_core(target: Path) -> list[float]:
    """Return the coefficients of the target's cost model, from a start-up profile on one thread."""
    engine = Engine(target, threads=1, budget_tokens=CACHE_TOKENS)
    fit = VerifierFit("bench")
    fit.start_from(profile(engine))
    return [round(c, 4) for c in fit.model().coefficients]


def make_tiny(target: Path, to: Path) -> Path:
    """Write a tiny model with random weights and the target's tokenizer to a folder; return the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(target, local_files_only=True)
    config.update(dict(TINY))
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[: TINY["num_hidden_layers"]] if config.layer_types else None
    torch.manual_seed(0)
    tiny = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    tiny.save_pretrained(to)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (target / name).is_file():
            shutil.copyfile(target / name, to / name)
    return to


@dataclass
class ScalingBench:
    """The window and the console that all points share."""

    window: Window
    progress: ConsoleProgress

    async def point(self, stack: Stack, workload: Workload, sessions: int) -> tuple[Measures, float]:
        """Measure one number of sessions on a running stack; return measures and CPU use in percent."""
        verifiers = len(stack.processes("verifier"))
        async with http_client(stack.url) as http:
            client = await LoadClient.connect(http, pools=False)
            with self.progress.step(f"{verifiers} verifiers, {sessions} sessions") as step:
                point = PointRun(
                    client, workload, workload, sessions, first_number(sessions, 0), self.window, step.detail
                )
                psutil.cpu_percent()
                lag = await stack.watch(point.run())
                busy = psutil.cpu_percent()
                measures = measure(point.records, self.window)
                step.done(f"{measures.throughput:.0f} tokens/s, the generator at most {lag.worst_ms:.0f} ms late")
        return measures, busy

    def stack(self, target: Path, verifiers: int, emulated: Sequence[float] = ()) -> Stack:
        """Return a suite with plain decoding. Its verifiers take the emulated time, if one is given."""
        env = {"WISP_DRAFT_SOURCE": "none", "WISP_ADMISSION": "false", "WISP_THREADS": "1"}
        env |= {"WISP_CACHE_TOKENS": str(CACHE_TOKENS), "WISP_EMULATED_COST": json.dumps(list(emulated))}
        return Stack("bench-scaling", verifiers=verifiers, target=target, env=env, progress=self.progress)


def row(measures: Measures, busy: float) -> list[Any]:
    """Return the values of a point for `COLUMNS`."""
    ttft, tpot = measures.ttft_ms, measures.tpot_ms
    return [
        *(measures.throughput, measures.goodput),
        *(100 * measures.attainment if measures.attainment is not None else None, measures.requests),
        *(ttft.p50 if ttft else None, tpot.p50 if tpot else None, tpot.p90 if tpot else None),
        *(measures.errors + measures.cut, busy),
    ]


async def scaled(
    bench: ScalingBench, workload: Workload, tiny: Path, emulated: Sequence[float], counts: Sequence[int], each: int
) -> list[list[Any]]:
    """Return the rows of the first table: a fixed number of sessions for each verifier, then a fixed number in all."""
    rows = []
    most = each * max(counts)
    for verifiers in counts:
        async with bench.stack(tiny, verifiers, emulated) as stack:
            for sessions in sorted({each * verifiers, most}):
                found = await bench.point(stack, workload, sessions)
                rows.append([verifiers, sessions, *row(*found)])
    return sorted(rows, key=lambda one: (one[1] == most, one[0]))


async def checked(
    bench: ScalingBench, workload: Workload, target: Path, tiny: Path, cost: Sequence[float], sessions: int
) -> list[list[Any]]:
    """Return the rows of the second table: one verifier, real and emulated at the same speed."""
    rows = []
    for kind, stack in (("real", bench.stack(target, 1)), ("emulated", bench.stack(tiny, 1, cost))):
        async with stack:
            rows.append([kind, sessions, *row(*await bench.point(stack, workload, sessions))])
    return rows


def main(
    verifiers: Annotated[str, typer.Option(help="Numbers of verifiers, comma-separated.")] = "1,2,4",
    sessions: Annotated[int, typer.Option(min=1, help="Sessions for each verifier.")] = 16,
    slower: Annotated[float, typer.Option(min=1, help="Factor by which the emulated target is slower.")] = 4.0,
    ttft: Annotated[int, typer.Option(min=1, help="TTFT target in ms; divided by --slower for the real model.")] = 4000,
    tpot: Annotated[int, typer.Option(min=1, help="TPOT target in ms; divided by --slower for the real model.")] = 400,
    warm_up: WarmUpOption = 10.0,
    measured: MeasuredOption = 30.0,
    check: Annotated[bool, typer.Option(help="Compare the emulation with the real model, on one verifier.")] = True,
    step: Annotated[int, typer.Option(min=0, help="Sessions of the load step, real model; 0 leaves it out.")] = 24,
    target: TargetOption = None,
) -> None:
    """Measure throughput by number of verifiers, and a load step."""
    with errors_shown():
        counts = sorted(whole_numbers("--verifiers", verifiers, 1))
        if not counts:
            raise SettingsError("--verifiers is empty; give numbers of verifiers such as 1,2,4")
        console = terminal()
        progress = ConsoleProgress(console)
        folder = target_folder(target, progress)
        cost = cost_on_one_core(folder)
        emulated = [round(slower * c, 4) for c in cost]
        bench = ScalingBench(Window(warm_up_s=warm_up, measure_s=measured, drain_s=measured), progress)
        slow, fast = (workload_of(WORKLOAD % (ttft / by, tpot / by)) for by in (1, slower))
        facts = {"model": folder.name, "slower": slower, "cost_on_one_core": cost, "ttft_ms": ttft, "tpot_ms": tpot}
        result: dict[str, Any] = {"facts": machine() | facts}

        def show(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
            result[name] = records(columns, rows)
            console.print(table(title, columns, rows))

        with TemporaryDirectory(prefix="wisp-scaling-") as made:
            tiny = make_tiny(folder, Path(made) / "tiny")
            rows = run(lambda: scaled(bench, slow, tiny, emulated, counts, sessions))
            title = f"Verifiers with the emulated time of {folder.name} on one core, times {slower:g}"
            show("emulated", title, ["verifiers", "sessions", *COLUMNS], rows)
            if check:
                rows = run(lambda: checked(bench, fast, folder, tiny, cost, sessions))
                title = f"One verifier: {folder.name} itself, and emulated at its own speed"
                show("check", title, ["verifier", "sessions", *COLUMNS], rows)
        if step:
            found = run(lambda: load_step(fast, folder, step, progress))
            title = f"Load step from 0 to {step} sessions, real model; triggered by {found.trigger}"
            show("load_step", title, ["event", "s after the step"], list(found.events.items()))
            spans = [[name, *row(measures, 0.0)[:-2]] for name, measures in found.clients.items()]
            show("clients", "The clients' figures", ["span", *COLUMNS[:-2]], spans)
        conclude(console, "scaling", result)


if __name__ == "__main__":
    run_program(main, "wisp bench scaling")
