"""One stream through the whole suite: drafts against plain decoding, and against transformers' `generate`.

Everything is real but the distance: five services, both brokers, HTTP. A delay between the drafter and the rest is
emulated by relays (`services.tools.bench.support.relay`)
before RabbitMQ and Redis, for the drafter's process alone; plain decoding
goes through the same drafter and so has the delay too. Each prompt is asked with each arm one after the other, in an
order that alternates, so that a drift of the machine cancels; then transformers computes the same number of tokens on
as many threads, while the suite is idle. Its answers count from the tokenized prompt, ours from the HTTP request.

An arm must not profit from a prompt that the one before left in the verifier's prefix cache. So the cache is kept
small, and where a prompt is long enough to be found again (a block of 64 tokens), a request that fills the cache goes
between.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console

from services.tools.bench.stream.cases import cases, kinds_of_text
from services.tools.bench.stream.core import speed
from services.tools.bench.stream.measurement import SampleAnswer, StreamMeasurement, StreamPlan
from services.tools.bench.support.report import keep, machine, table, terminal
from services.tools.cli.paint import Painter
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_target
from shared.errors import SettingsError
from shared.messages import DraftChoice
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

QUICK_KINDS = "chat,code,list,rewrite"


class StreamReport:
    """Prints what a measurement says, and writes it down."""

    def __init__(self, measurement: StreamMeasurement, console: Console) -> None:
        self.verdicts: list[str] = []
        self._found = measurement
        self._console = console

    def tell(self, delay_ms: float, sample: SampleAnswer) -> None:
        """Print one delay."""
        plan, console = self._found.plan, self._console
        here = [one for one in self._found.timed if one.delay_ms == delay_ms]
        columns, rows = speed.arms_table(
            [*here, *(self._found.rivals if delay_ms == plan.delays[0] else [])], plan.temperatures
        )
        console.print()
        console.print(table(f"{delay_ms:g} ms added, all kinds of text", columns, rows))
        for arm in plan.arms[1:]:
            columns, rows = speed.kinds_table(here, arm, plan.temperatures)
            console.print(table(f"{delay_ms:g} ms added, {arm} by kind of text", columns, rows))
        console.print(f"{sample.timed.case.name}, drafts {sample.timed.arm}:", highlight=False)
        Painter(console).draw_rounds(sample.answer.rounds)
        for arm in plan.arms[1:]:
            said = speed.verdict(
                [*here, *self._found.rivals], arm, list(dict.fromkeys(one.arm for one in self._found.rivals))
            )
            self.verdicts.append(f"{delay_ms:g} ms added, {said}.")
            console.print(self.verdicts[-1], highlight=False, soft_wrap=True)
        console.print()

    def conclude(self) -> bool:
        """Print what holds for all delays and write the result file; returns whether all texts are the same."""
        wrong = speed.differences(self._found.timed)
        notes = [
            "tokens/s and ratios count whole requests, the first token included; ratios are medians over prompts",
            *speed.agreements(self._found.rivals),
            f"the suite's texts are the same in all arms and delays: {'NO' if wrong else 'yes'}",
        ]
        facts = {**machine(), **self._facts()}
        console = self._console
        console.print(", ".join(f"{key} {value}" for key, value in facts.items()), style="dim", highlight=False)
        for note in notes:
            console.print(note, highlight=False, soft_wrap=True)
        for line in wrong:
            console.print(f"DIFFERENT TEXT: {line}", style="bold red", highlight=False, soft_wrap=True)
        path = keep(
            "stream",
            {
                "facts": facts,
                "verdicts": self.verdicts,
                "notes": notes,
                "differences": wrong,
                "requests": [one.record() for one in [*self._found.timed, *self._found.rivals]],
            },
        )
        console.print(f"written to {path}", style="dim", highlight=False)
        return not wrong

    def _facts(self) -> dict[str, Any]:
        plan = self._found.plan
        return {
            "model": plan.target.name,
            "dtype": plan.dtype,
            "threads": plan.threads,
            "prompts": len({(case.kind, case.number) for case in plan.cases}),
            "max_tokens": plan.tokens,
            "seed": plan.cases[0].seed,
            **{package: version(package) for package in ("torch", "transformers")},
            **self._found.servers,
        }


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word for word in (part.strip() for part in text.split(",")) if word))


def _numbers(option: str, text: str, most: float) -> list[float]:
    try:
        found = [float(word) for word in _words(text)]
    except ValueError:
        found = []
    if not found or not all(0 <= number <= most for number in found):
        raise SettingsError(f"{option} takes numbers from 0 to {most:g} with commas between them (given: {text!r})")
    return found


def _known(option: str, text: str, known: list[str]) -> list[str]:
    found = _words(text)
    if not found or not set(found) <= set(known):
        raise SettingsError(f"{option} takes some of {', '.join(known)}, with commas between them (given: {text!r})")
    return found


def main(
    prompts: Annotated[int | None, typer.Option(min=1, help="prompts of each kind (default 2, quick 1)")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="longest answer (default 96, quick 48)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="chooses the prompts and the sampled texts")] = 0,
    kinds: Annotated[
        str | None, typer.Option(help=f"kinds of text, as chat,code (default all, quick {QUICK_KINDS})")
    ] = None,
    delays: Annotated[
        str | None,
        typer.Option(help="ms added between drafter and rest, there and back (default 0,20,100, quick 0,100)"),
    ] = None,
    temperatures: Annotated[
        str | None, typer.Option(help="of sampling, 0 is greedy (default 0,0.7,1, quick 0,0.7)")
    ] = None,
    drafts: Annotated[
        str, typer.Option(help="draft sources to compare with none; auto is the drafter's own choice")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the verifier, and of transformers")] = 1,
    target: Annotated[str | None, typer.Option(help="packaged model or a Hugging Face folder")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    rivals: Annotated[bool, typer.Option("--transformers/--no-transformers", help="measure transformers too")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="few prompts and kinds, some minutes")] = False,
) -> None:
    """Measure and report; the draft source and its settings are those of the WISP_ variables. Exit status 1 if a text
    differs between drafts on and off, or between delays."""
    with errors_shown():
        # Before torch is loaded: waiting threads must not spin while the suite works.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        console = terminal()
        folder = prepare_target(target or LocalSettings().target, ConsoleProgress(console))
        chosen = _numbers("--temperatures", temperatures or ("0,0.7" if quick else "0,0.7,1"), 2)
        sources = _known("--drafts", drafts, [choice.value for choice in DraftChoice if choice != speed.PLAIN])
        of_text = kinds_of_text()
        plan = StreamPlan(
            target=folder,
            dtype=dtype,
            threads=threads,
            arms=[speed.PLAIN, *sources],
            delays=_numbers("--delays", delays or ("0,100" if quick else "0,20,100"), 10_000),
            temperatures=chosen,
            tokens=tokens or (48 if quick else 96),
            cases=cases(
                _known("--kinds", kinds or (QUICK_KINDS if quick else ",".join(of_text)), of_text),
                prompts or (1 if quick else 2),
                chosen,
                seed,
                Tokenizer(ModelFolder(folder)),
            ),
        )
        rival = None
        if rivals:
            from services.tools.bench.stream.transformers_arms import TransformersArms

            rival = TransformersArms(folder, dtype, threads)
        measurement = StreamMeasurement(plan, rival, ConsoleProgress(console))
        report = StreamReport(measurement, console)

        async def work() -> bool:
            same = True
            try:
                await measurement.run(report.tell)
            finally:
                if measurement.timed:
                    same = report.conclude()
            return same

        if not run(work):
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
