"""Options that `wisp replay` and `wisp journal` share."""

from __future__ import annotations

from typing import Annotated

import typer

RECORDING = "Recording"

Namespace = Annotated[
    str | None,
    typer.Option(
        help="The suite's prefix. \\[env: WISP_NAMESPACE; default: the suite running here]", rich_help_panel=RECORDING
    ),
]
AmqpUrl = Annotated[
    str | None,
    typer.Option(
        help="The suite's RabbitMQ. \\[env: WISP_AMQP_URL; default: the suite running here]", rich_help_panel=RECORDING
    ),
]
Since = Annotated[
    str | None, typer.Option(help="First moment: 90s, 10m or 2h ago, or 2026-11-25T14:30.", rich_help_panel=RECORDING)
]
Until = Annotated[str | None, typer.Option(help="Last moment, in the form of --since.", rich_help_panel=RECORDING)]
