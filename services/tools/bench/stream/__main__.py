"""`wisp bench stream`: one stream through the whole suite, drafts against plain decoding and models in one process.

Five services, both brokers and HTTP are real; only the distance is emulated. Relays before RabbitMQ and Redis emulate a
delay between the drafter and the rest (`services.tools.bench.support.relay`). Plain decoding goes through the same
drafter, so it has the delay too. Each prompt is sent with each arm in turn, in alternating order, so that a drift of
the machine cancels out. Then the target's engine and transformers' `generate` compute the same number of tokens in this
process on as many threads, while the suite is idle. Their times count from the tokenized prompt, ours from the HTTP
request.

No arm may profit from a prompt that the arm before left in the verifier's prefix cache. So the cache is small, and
before each prompt that is long enough to be shared (a block of 64 tokens), another request fills the cache.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console

from services.drafter.sources.registry import CHOICES
from services.tools.bench.stream.cases import cases, kinds_of_text
from services.tools.bench.stream.core import speed
from services.tools.bench.stream.generated import InProcessModel
from services.tools.bench.stream.measurement import SampleAnswer, StreamMeasurement, StreamPlan
from services.tools.bench.support.options import (
    DtypeOption,
    let_idle_threads_sleep,
    numbers,
    run_program,
    some_of,
    target_folder,
)
from services.tools.bench.support.report import conclude, machine, table, terminal
from services.tools.cli.paint import Painter
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.progress import ConsoleProgress
from shared.models.folder import AUTO, ModelFolder
from shared.models.text import Tokenizer

QUICK_KINDS = "chat,code,list,rewrite"
DRAFT_SOURCES = [name for name in CHOICES if name != speed.PLAIN]
LONGEST_DELAY_MS = 10_000


class StreamReport:
    """Prints the results of a measurement, and writes the result file."""

    def __init__(self, measurement: StreamMeasurement, console: Console) -> None:
        self.verdicts: list[str] = []
        self._measurement = measurement
        self._console = console

    def show_delay(self, delay_ms: float, sample: SampleAnswer) -> None:
        """Print the tables of one delay, and draw an answer."""
        plan, console = self._measurement.plan, self._console
        here = [one for one in self._measurement.timed if one.delay_ms == delay_ms]
        columns, rows = speed.arms_table(
            [*here, *(self._measurement.rivals if delay_ms == plan.delays[0] else [])], plan.temperatures
        )
        console.print()
        console.print(table(f"{delay_ms:g} ms added, all kinds of text", columns, rows))
        for arm in plan.arms[1:]:
            columns, rows = speed.kinds_table(here, arm, plan.temperatures)
            console.print(table(f"{delay_ms:g} ms added, {arm} by kind of text", columns, rows))
        console.print(f"{sample.timed.case.name}, drafts {sample.timed.arm}:", highlight=False)
        Painter(console).draw_rounds(sample.answer.rounds)
        plain = speed.plain_verdict([*here, *self._measurement.rivals]) if delay_ms == plan.delays[0] else None
        if plain is not None:
            self.verdicts.append(f"{delay_ms:g} ms added, {plain}.")
            console.print(self.verdicts[-1], highlight=False, soft_wrap=True)
        for arm in plan.arms[1:]:
            rival_arms = list(dict.fromkeys(one.arm for one in self._measurement.rivals))
            verdict = speed.verdict([*here, *self._measurement.rivals], arm, rival_arms)
            self.verdicts.append(f"{delay_ms:g} ms added, {verdict}.")
            console.print(self.verdicts[-1], highlight=False, soft_wrap=True)
        console.print()

    def conclude(self) -> bool:
        """Print the results of all delays and write the result file; return whether all completions are the same."""
        wrong = speed.differences(self._measurement.timed)
        notes = [
            "tokens/s and ratios count whole requests, the first token included; ratios are medians over prompts",
            *speed.agreements(self._measurement.rivals),
            f"the suite's completions are the same with all arms and delays: {'NO' if wrong else 'yes'}",
        ]
        for line in wrong:
            self._console.print(f"DIFFERENT TEXT: {line}", style="bold red", highlight=False, soft_wrap=True)
        record = {
            "facts": {**machine(), **self._facts()},
            "verdicts": self.verdicts,
            "notes": notes,
            "differences": wrong,
            "requests": [one.record() for one in [*self._measurement.timed, *self._measurement.rivals]],
        }
        conclude(self._console, "stream", record)
        return not wrong

    def _facts(self) -> dict[str, Any]:
        plan = self._measurement.plan
        return {
            "model": plan.target.name,
            "dtype": plan.dtype,
            "threads": plan.threads,
            "prompts": len({(case.kind, case.number) for case in plan.cases}),
            "max_tokens": plan.tokens,
            "seed": plan.cases[0].seed,
            **{package: version(package) for package in ("torch", "transformers")},
            **self._measurement.servers,
        }


def main(
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each kind. \\[default: 2; with --quick: 1]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of an answer. \\[default: 96; with --quick: 48]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts and of sampling.")] = 0,
    kinds: Annotated[
        str | None, typer.Option(help=f"Kinds of text, as chat,code. \\[default: all; with --quick: {QUICK_KINDS}]")
    ] = None,
    delays: Annotated[
        str | None,
        typer.Option(
            help="Round-trip delays between the drafter and the rest, in ms. \\[default: 0,20,100; with --quick: 0,100]"
        ),
    ] = None,
    temperatures: Annotated[
        str | None,
        typer.Option(help="Sampling temperatures; 0 is greedy. \\[default: 0,0.7,1; with --quick: 0,0.7]"),
    ] = None,
    drafts: Annotated[
        str, typer.Option(help="Draft sources to compare with none; auto leaves the choice to the drafter.")
    ] = "auto",
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of the verifier, and of the models in this process.")
    ] = 1,
    target: TargetOption = None,
    dtype: DtypeOption = AUTO,
    rivals: Annotated[bool, typer.Option("--transformers/--no-transformers", help="Measure transformers too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Measure few prompts and kinds, in a few minutes.")] = False,
) -> None:
    """Measure the speed of one stream. WISP_ variables choose the draft source and its settings.

    Exit status 1 if a completion differs between drafts on and off, or between delays.
    """
    with errors_shown():
        let_idle_threads_sleep()
        console = terminal()
        folder = target_folder(target, ConsoleProgress(console))
        chosen_temperatures = numbers("--temperatures", temperatures or ("0,0.7" if quick else "0,0.7,1"), 2)
        known_kinds = kinds_of_text()
        plan = StreamPlan(
            target=folder,
            dtype=ModelFolder(folder).resolved(dtype),
            threads=threads,
            arms=[speed.PLAIN, *some_of("--drafts", drafts, DRAFT_SOURCES)],
            delays=numbers("--delays", delays or ("0,100" if quick else "0,20,100"), LONGEST_DELAY_MS),
            temperatures=chosen_temperatures,
            tokens=tokens or (48 if quick else 96),
            cases=cases(
                some_of("--kinds", kinds or (QUICK_KINDS if quick else ",".join(known_kinds)), known_kinds),
                prompts or (1 if quick else 2),
                chosen_temperatures,
                seed,
                Tokenizer(ModelFolder(folder)),
            ),
        )
        if not _measure(plan, rivals, console):
            raise typer.Exit(1)


def _measure(plan: StreamPlan, rivals: bool, console: Console) -> bool:
    """Measure and report; return whether all completions of a case are the same."""
    # Imported here, because torch takes seconds to load.
    from services.tools.bench.stream.bare_engine import BareEngine

    models: list[InProcessModel] = [BareEngine(plan.target, plan.dtype, plan.threads, plan.cache_tokens)]
    if rivals:
        from services.tools.bench.stream.transformers_arms import TransformersArms

        models.append(TransformersArms(plan.target, plan.dtype, plan.threads))
    measurement = StreamMeasurement(plan, models, ConsoleProgress(console))
    report = StreamReport(measurement, console)

    async def work() -> bool:
        same = True
        try:
            await measurement.run(report.show_delay)
        finally:
            if measurement.timed:
                same = report.conclude()
        return same

    return run(work)


if __name__ == "__main__":
    run_program(main, "wisp bench stream")
