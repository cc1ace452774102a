"""What more verifiers bring, and how long a new one takes to come: `wisp bench scaling`.

More verifiers than a machine has cores cannot show on it what they bring, unless their time is emulated: each runs a
tiny random model and waits, for every batch, as long as the target would have taken on a core of its own (times
`--slower`). Its cost model is measured first, on the target itself, on one thread. Everything else is real: the
services, the brokers, the scheduler's decisions and the sessions' load.

The last table is a load step: sessions come that are too many for one verifier, the rule of `k8s/components/keda` is
applied to the scheduler's own metrics at KEDA's interval, and verifiers with the real model start as it says. What
Kubernetes adds, it adds to that: finding a node, fetching the image.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families

from services.bench.load.client import Client, http_client
from services.bench.load.drive import Point
from services.bench.load.measures import Measures, Window, measure
from services.bench.load.requests import first_number
from services.bench.load.workload import Workload, workload_of
from services.bench.report import keep, machine, table, terminal
from services.cli.ports import LOOPBACK, free_ports
from services.cli.progress import ConsoleProgress
from services.cli.settings import LocalSettings
from services.cli.stack import Stack
from services.cli.target import prepare_target
from services.cli.terminal import errors_shown, run
from services.verifier.profile import profile
from shared.engine import Engine
from shared.errors import SettingsError
from shared.fit import VerifierFit

WORKLOAD = """
ignore_eos = true
think_s = [{distribution = "constant", value = 0}]
prompt_tokens = [{distribution = "lognormal", median = 50, sigma = 0.6, low = 20, high = 150}]
output_tokens = [{distribution = "uniform", low = 24, high = 48}]
classes = [{name = "all", ttft_ms = %d, tpot_ms = %d}]
devices = [{name = "none"}]
temperatures = [{value = 1.0}]
"""
CACHE_TOKENS = 32768
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
"""Of the model that is really computed where time is emulated."""
POLLING_S = 5.0
QUEUE_DELAY, QUEUE_DELAY_S = "wisp_scheduler_predicted_queue_delay_seconds", 0.2
ROUNDS, MISSED_SHARE = "wisp_scheduler_rounds_total", 0.05
UTILIZATION, UTILIZED = "wisp_scheduler_utilization", 0.7
"""The triggers of `k8s/components/keda/verifier.yaml`: metric, and what is wanted of it."""
BATCHES = "wisp_verifier_batches_total"


@dataclass(frozen=True)
class Seen:
    """The metrics of a scheduler or a verifier at one moment."""

    queue_delay_s: float
    utilization: float
    met: float
    missed: float
    batches: float
    """Of a verifier."""

    def wanted(self, verifiers: int, before: Seen) -> int:
        """Verifiers that an autoscaler would have: the present number times the worst ratio of measured to wanted."""
        rounds = self.met - before.met + self.missed - before.missed
        missed = (self.missed - before.missed) / rounds if rounds else 0.0
        ratios = (self.queue_delay_s / QUEUE_DELAY_S, missed / MISSED_SHARE, self.utilization / UTILIZED)
        return max(1, math.ceil(verifiers * max(ratios) - 0.1))


def seen(text: str) -> Seen:
    """What the text of `/metrics` says."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {(sample.name, sample.labels.get("deadline", "")): sample.value for sample in samples}
    return Seen(
        queue_delay_s=values.get((QUEUE_DELAY, ""), 0.0),
        utilization=values.get((UTILIZATION, ""), 0.0),
        met=values.get((ROUNDS, "met"), 0.0),
        missed=values.get((ROUNDS, "missed"), 0.0),
        batches=values.get((BATCHES, ""), 0.0),
    )


def cost_on_one_core(target: Path) -> list[float]:
    """Coefficients of the target's cost model, from a start-up profile on one thread."""
    engine = Engine(target, threads=1, budget_tokens=CACHE_TOKENS)
    fit = VerifierFit("bench")
    fit.start_from(list(profile(engine)))
    return [round(c, 4) for c in fit.model().coefficients]


def make_tiny(target: Path, to: Path) -> Path:
    """A model with the target's tokenizer that takes next to no time, with random weights."""
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
class Bench:
    """What all points have in common."""

    workload: Workload
    window: Window
    progress: ConsoleProgress

    async def point(self, stack: Stack, sessions: int) -> Measures:
        """Measure one number of sessions on a running stack."""
        async with http_client(stack.url) as http:
            client = await Client.connect(http, pools=False)
            with self.progress.step(f"{len(stack.processes('verifier'))} verifiers, {sessions} sessions") as step:
                point = Point(
                    client, self.workload, self.workload, sessions, first_number(sessions, 0), self.window, step.detail
                )
                lag = await point.run()
                measures = measure(point.records, self.window)
                step.done(f"{measures.throughput:.0f} tokens/s, the generator at most {lag.worst_ms:.0f} ms late")
        return measures


async def scaled(bench: Bench, tiny: Path, emulated: list[float], counts: list[int], each: int) -> list[list[Any]]:
    """The rows of the first table: as many sessions for each verifier, and as many in all."""
    rows = []
    env = {"WISP_DRAFT_SOURCE": "none", "WISP_ADMISSION": "false", "WISP_THREADS": "1"}
    env |= {"WISP_CACHE_TOKENS": str(CACHE_TOKENS), "WISP_EMULATED_COST": json.dumps(emulated)}
    first: dict[str, float] = {}
    for verifiers in counts:
        async with Stack("bench-scaling", verifiers=verifiers, target=tiny, env=env, progress=bench.progress) as stack:
            for kind, sessions in (("same for each", each * verifiers), ("same in all", each * max(counts))):
                measures = await stack.watch(bench.point(stack, sessions))
                one = first.setdefault(kind, measures.throughput / verifiers)
                ttft, tpot = measures.ttft_ms, measures.tpot_ms
                rows.append(
                    [
                        *(kind, verifiers, sessions, measures.throughput, measures.throughput / one if one else None),
                        *(measures.goodput, 100 * measures.attainment if measures.attainment is not None else None),
                        *(ttft.p50 if ttft else None, tpot.p50 if tpot else None, tpot.p90 if tpot else None),
                        measures.errors + measures.cut,
                    ]
                )
    return sorted(rows, key=lambda row: (row[0] != "same for each", row[1]))


async def load_step(bench: Bench, target: Path, sessions: int, most: int) -> dict[str, Any]:
    """Bring the load, scale by the rule, and tell when what happened, in seconds after the load's step."""
    ports = free_ports(2)

    def with_metrics(port: int) -> dict[str, str]:
        return {"WISP_METRICS_PORT": str(port), "WISP_METRICS_HOST": LOOPBACK}

    env = {"WISP_ADMISSION": "false", "WISP_THREADS": "1", "WISP_DRAFT_SOURCE": "lookup"}
    env_of = {"scheduler": with_metrics(ports[0])}
    events: dict[str, Any] = {}
    async with (
        Stack("bench-scaling", target=target, env=env, env_of=env_of, progress=bench.progress) as stack,
        http_client(stack.url) as http,
        httpx.AsyncClient() as asking,
    ):
        client = await Client.connect(http, pools=False)

        async def metrics(port: int) -> Seen:
            return seen((await asking.get(f"http://{LOOPBACK}:{port}/metrics")).text)

        idle = Window(warm_up_s=0, measure_s=3600, drain_s=0)
        load = Point(client, bench.workload, bench.workload, sessions, 1, idle)
        before = await metrics(ports[0])
        began = time.perf_counter()
        running = asyncio.create_task(load.run())
        try:
            with bench.progress.step(f"load step to {sessions} sessions") as step:
                while True:
                    await asyncio.sleep(POLLING_S)
                    now = await metrics(ports[0])
                    wanted = min(most, now.wanted(1, before))
                    step.detail(f"wanted: {wanted} verifiers")
                    if wanted > 1:
                        break
                    before = now
                    if time.perf_counter() - began > 60:
                        raise SettingsError(f"{sessions} sessions are no load for one verifier; give more with --step")
                events["decided"] = time.perf_counter() - began
                events["verifiers wanted"] = wanted
                events["predicted queue delay"] = now.queue_delay_s
                await stack.start("verifier", env=with_metrics(ports[1]))
                events["new verifier ready"] = time.perf_counter() - began
                while not (await metrics(ports[1])).batches:  # noqa: ASYNC110 - it happens in another process
                    await asyncio.sleep(0.02)
                events["new verifier serving"] = time.perf_counter() - began
                step.done(f"a new verifier serves {events['new verifier serving']:.1f} s after the load came")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    return events


def main(
    verifiers: Annotated[str, typer.Option(help="Numbers of verifiers, comma-separated.")] = "1,2,4",
    sessions: Annotated[int, typer.Option(min=1, help="Sessions for each verifier.")] = 16,
    slower: Annotated[float, typer.Option(min=1, help="Emulate a target that takes so many times as long.")] = 4.0,
    ttft: Annotated[int, typer.Option(min=1, help="Promised time to the first token, ms.")] = 4000,
    tpot: Annotated[int, typer.Option(min=1, help="Promised time per token after it, ms.")] = 400,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of load before those that count.")] = 10.0,
    measured: Annotated[float, typer.Option("--measure", min=1, help="Seconds in which requests count.")] = 30.0,
    step: Annotated[int, typer.Option(min=0, help="Sessions of the load step, on the real model; 0: none.")] = 24,
    target: Annotated[str | None, typer.Option(help="Packaged model or a Hugging Face folder.")] = None,
) -> None:
    """Measure scaling."""
    with errors_shown():
        try:
            counts = sorted({int(text) for text in verifiers.split(",")})
        except ValueError:
            raise SettingsError(f"--verifiers takes numbers, as 1,2,4 (given: {verifiers!r})") from None
        console = terminal()
        progress = ConsoleProgress(console)
        folder = prepare_target(target or LocalSettings().target, progress)
        facts: dict[str, Any] = machine() | {"model": folder.name, "slower": slower, "ttft_ms": ttft, "tpot_ms": tpot}
        measured_cost = cost_on_one_core(folder)
        facts["cost_on_one_core"] = measured_cost
        emulated = [round(slower * c, 4) for c in measured_cost]
        window = Window(warm_up_s=warm_up, measure_s=measured, drain_s=measured)
        bench = Bench(workload_of(WORKLOAD % (ttft, tpot)), window, progress)
        columns = ["sessions", "verifiers", "in all", "tokens/s", "times one", "goodput", "attained %"]
        columns += ["TTFT ms", "TPOT ms", "TPOT p90", "failed"]

        async def work() -> tuple[list[list[Any]], dict[str, Any]]:
            with TemporaryDirectory(prefix="wisp-scaling-") as made:
                rows = await scaled(bench, make_tiny(folder, Path(made) / "tiny"), emulated, counts, sessions)
            return rows, await load_step(bench, folder, step, max(counts)) if step else {}

        rows, events = run(work)
        console.print(
            table(f"Verifiers with the emulated time of {folder.name} on one core, times {slower:g}", columns, rows)
        )
        if events:
            listed = [[what, value] for what, value in events.items()]
            console.print(table(f"Load step from 0 to {step} sessions, real model (s)", ["event", "after"], listed))
        path = keep(
            "scaling",
            {"facts": facts, "rows": [dict(zip(columns, row, strict=True)) for row in rows], "load_step": events},
        )
        console.print(f"written to {path}", style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
