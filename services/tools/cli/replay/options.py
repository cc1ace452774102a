"""Options of `wisp replay`, in the groups of its `--help`. `wisp journal` has some of them too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.tools.cli.shared_options import RECORDING_PANEL

SHOW = "Timelines"
VERIFY = "Compute the batches again"
POLICY = "Replay under another batch policy"
INJECT = "Send the requests to another suite"

Since = Annotated[
    str | None,
    typer.Option(help="First moment: 90s, 10m or 2h ago, or 2026-11-25T14:30.", rich_help_panel=RECORDING_PANEL),
]
Until = Annotated[
    str | None, typer.Option(help="Last moment, in the form of --since.", rich_help_panel=RECORDING_PANEL)
]
SessionArgument = Annotated[
    str | None, typer.Argument(help="A session's id or the beginning of it. \\[default: list all sessions]")
]
EveryOption = Annotated[bool, typer.Option("--all", help="Show the timelines of all sessions.", rich_help_panel=SHOW)]
StepsOption = Annotated[
    bool, typer.Option("--steps", help="Show the steps of runs too, report by report.", rich_help_panel=SHOW)
]
AsJsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=SHOW)]
TraceOption = Annotated[
    Path | None,
    typer.Option(help="Write a trace for Perfetto (ui.perfetto.dev) or speedscope.", rich_help_panel=SHOW),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Compute the batches again and compare bit for bit; exit status 1 if they differ, 3 if they "
        "differ only where the recording is of another arithmetic.",
        rich_help_panel=VERIFY,
    ),
]
SessionsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="For --verify: only so many sessions, the latest. \\[default: all]", rich_help_panel=VERIFY
    ),
]
TimeLimitOption = Annotated[
    float | None,
    typer.Option(
        min=0, help="For --verify: seconds of computing; 0 has no limit. \\[default: 600]", rich_help_panel=VERIFY
    ),
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Replay the same requests in virtual time under this batch policy; may be repeated.",
        rich_help_panel=POLICY,
    ),
]
StopRuleOption = Annotated[
    str | None,
    typer.Option(help="For --policy: `marginal` decides anew how much of each draft is sent.", rich_help_panel=POLICY),
]
DraftLengthOption = Annotated[
    int | None,
    typer.Option(min=0, help="For --policy: cut drafts to this length; 0 is plain decoding.", rich_help_panel=POLICY),
]
InjectOption = Annotated[
    bool,
    typer.Option(
        "--inject",
        help="Send the recorded requests to a suite in another virtual host (--vhost).",
        rich_help_panel=INJECT,
    ),
]
VhostOption = Annotated[
    str | None, typer.Option(help="For --inject: the virtual host; never the live one.", rich_help_panel=INJECT)
]
IntoOption = Annotated[
    str | None,
    typer.Option(help="For --inject: the namespace of that suite. \\[default: wisp]", rich_help_panel=INJECT),
]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(help="For --inject: the Redis of that suite. \\[env: WISP_REDIS_URL]", rich_help_panel=INJECT),
]
SpeedOption = Annotated[
    float, typer.Option(min=0.001, help="For --inject: times the recorded speed.", rich_help_panel=INJECT)
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        help="Target model, for --verify and for the text of tokens. \\[env: WISP_TARGET]", rich_help_panel=SHOW
    ),
]
