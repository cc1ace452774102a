"""The `wisp` command line. Slow imports are inside the commands that need them."""

from __future__ import annotations

import asyncio
import importlib.metadata
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from services.tools.cli import (
    broker_command,
    controller_command,
    draft_command,
    journal_command,
    keys_command,
    models_command,
    other_programs,
    top_command,
    trace_command,
)
from services.tools.cli.program import Program
from services.tools.cli.replay import command as replay_command
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.stack_options import (
    API_PANEL,
    DraftersOption,
    DraftModelOption,
    DraftOption,
    DtypeOption,
    HiddenDraftOption,
    ServedDraftersOption,
    ServingChoice,
    ServingOption,
    StackCommand,
    TargetProfileOption,
    ThreadsOption,
    TraceOption,
    VerifiersOption,
    stack_for,
)
from services.tools.cli.terminal import err, errors_shown, out, print_fields, require, run, stopped_by_signals

app = Program(name="wisp", no_args_is_help=True)
app.add_typer(models_command.app, name="models")
app.add_typer(draft_command.app, name="draft")
app.add_typer(controller_command.app, name="controller")
app.add_typer(keys_command.app, name="keys")
app.add_typer(broker_command.app, name="broker")
app.add_typer(journal_command.app, name="journal")
app.add_typer(trace_command.app, name="trace")
app.command()(top_command.top)
app.command()(replay_command.replay)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"wisp {importlib.metadata.version('wisp')}")
        raise typer.Exit


@app.callback()
def wisp(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve a language model by distributed speculative decoding."""


UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="URL of a running gateway, ending in /v1. \\[default: a stack of its own]",
        rich_help_panel=API_PANEL,
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="API key, if the gateway needs one. \\[env: WISP_API_KEY, OPENAI_API_KEY]",
        rich_help_panel=API_PANEL,
    ),
]


@app.command(cls=StackCommand)
def up(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the API; 0 takes a free one.", rich_help_panel=API_PANEL)
    ] = 8000,
    host: Annotated[
        str,
        typer.Option(help="Address of the API. Any other than loopback needs --api-keys.", rich_help_panel=API_PANEL),
    ] = "127.0.0.1",
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File of API keys (`wisp keys new`). \\[env: WISP_API_KEYS_FILE]", rich_help_panel=API_PANEL),
    ] = None,
    target: TargetOption = None,
    dtype: DtypeOption = None,
    drafters: ServedDraftersOption = 1,
    verifiers: VerifiersOption = 1,
    threads: ThreadsOption = None,
    draft: DraftOption = None,
    draft_model: DraftModelOption = None,
    hidden_draft: HiddenDraftOption = None,
    serving: ServingOption = ServingChoice.WISP,
    target_profile: TargetProfileOption = None,
    trace: TraceOption = None,
) -> None:
    """Run the suite in the foreground, for any OpenAI client. Ctrl-C and SIGTERM stop it, with exit status 0."""
    with errors_shown():
        require("gateway", "model")
        from services.tools.cli.up import require_keys, require_port, up

        key_file = require_keys(host, api_keys)
        require_port(host, port)
        stack = stack_for(
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
            target_profile=target_profile,
            trace=trace,
        )

        async def work() -> None:
            async with stack:
                await up(stack, out)

        with suppress(KeyboardInterrupt, asyncio.CancelledError):  # the ordinary ends: Ctrl-C, SIGTERM and SIGHUP
            run(work)


@app.command(cls=StackCommand)
def demo(
    url: UrlOption = None,
    key: KeyOption = None,
    target: TargetOption = None,
    dtype: DtypeOption = None,
    drafters: DraftersOption = 1,
    verifiers: VerifiersOption = 1,
    threads: ThreadsOption = None,
    draft: DraftOption = None,
    draft_model: DraftModelOption = None,
    hidden_draft: HiddenDraftOption = None,
    rounds: Annotated[
        bool,
        typer.Option(
            "--rounds", help="Draw the first rounds of each answer: times and tokens.", rich_help_panel="Answers"
        ),
    ] = False,
) -> None:
    """Ask three questions and compare the answers with plain decoding; exit status 1 if they differ."""
    with errors_shown():
        require("client")
        from services.tools.cli.demo import demo

        if url is not None:
            if not run(lambda: demo(url, out, rounds, key)):
                raise typer.Exit(1)
            return
        require("gateway", "model")
        stack = stack_for(
            "demo", target, dtype, draft, draft_model, hidden_draft, threads, drafters=drafters, verifiers=verifiers
        )

        async def work() -> bool:
            async with stack:
                return await stack.watch(demo(stack.url, out, rounds))

        identical = run(work)
        out.print("The demo's suite and playground have stopped. `wisp up` starts them to stay.", soft_wrap=True)
        if not identical:
            raise typer.Exit(1)


@app.command(cls=StackCommand)
def chat(
    url: Annotated[
        str | None,
        typer.Option(
            help="URL of a running gateway, ending in /v1. \\[default: of the suite that `wisp up` runs here, unless "
            "options describe another; else a stack of its own]",
            rich_help_panel=API_PANEL,
        ),
    ] = None,
    key: KeyOption = None,
    target: TargetOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    draft: DraftOption = None,
    draft_model: DraftModelOption = None,
    hidden_draft: HiddenDraftOption = None,
    system: Annotated[
        str | None, typer.Option(help="System message. \\[default: the model's own]", rich_help_panel="Answers")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Sampling temperature; 0 is greedy.", rich_help_panel="Answers")
    ] = 0.2,
) -> None:
    """Chat with the model in the terminal; accepted draft tokens and copies of earlier text are coloured."""
    with errors_shown():
        require("client")
        from services.tools.cli.chat import Chat, running_suite

        def chat_at(at: str) -> Chat:
            return Chat(at, out, draft=draft or "auto", system=system, temperature=temperature, key=key)

        if url is None and not any((target, dtype, draft_model, hidden_draft, threads)):
            url = running_suite(out)
        if url is not None:
            chat_at(url).talk()
            return
        require("gateway", "model")
        from services.tools.local.background import Background

        # The output of a chat that is no terminal is the conversation only.
        shown = out if out.is_terminal else err
        stack = stack_for("chat", target, dtype, draft, draft_model, hidden_draft, threads, console=shown)
        with stopped_by_signals(), Background(stack) as background:

            def check() -> None:
                if background.failure is not None:
                    raise background.failure

            chat_at(background.stack.url).talk(check=check)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this machine and print advice for each missing part; exit status 1 if a required part is missing."""
    with errors_shown():
        from services.tools.cli.doctor import check_machine

        with err.status("checking …") if err.is_terminal else nullcontext() as status:

            def begins(name: str) -> None:
                if status is not None:
                    status.update(f"checking {name} …")

            findings = run(lambda: check_machine(begins))
        if as_json:
            print_fields(out, [asdict(finding) for finding in findings])
        else:
            table = Table(box=None, show_header=False, padding=(0, 1))
            marks = {"ok": ("✓", "green"), "note": ("!", "yellow"), "missing": ("✗", "red")}
            table.add_column()
            table.add_column(overflow="fold", max_width=22)
            table.add_column(overflow="fold")
            for finding in findings:
                text = Text(finding.found)
                if finding.advice:
                    text.append(f"\n→ {finding.advice}", "yellow")
                table.add_row(Text(*marks[finding.state]), finding.part, text)
            out.print(table)
        if any(finding.state == "missing" for finding in findings):
            raise typer.Exit(1)


@app.command()
def settings(
    service: Annotated[str, typer.Argument(help="gateway, drafter, scheduler, estimator, verifier or drainorder.")],
) -> None:
    """Print a service's settings with their defaults as an environment file for containers, Kubernetes or systemd."""
    with errors_shown():
        from services.tools.cli.environment import environment, settings_of

        print(environment(settings_of(service)), end="")


other_programs.add_to(app)
