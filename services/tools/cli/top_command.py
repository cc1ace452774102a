"""`wisp top` on the command line."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from services.tools.cli.terminal import errors_shown, out, run


def top(
    namespace: Annotated[
        str | None, typer.Option(help="The suite's prefix. \\[env: WISP_NAMESPACE; default: of the suite running here]")
    ] = None,
    amqp_url: Annotated[
        str | None, typer.Option(help="Its RabbitMQ. \\[env: WISP_AMQP_URL; default: of the suite running here]")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print what was seen in --seconds, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, for scripts.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="How long to observe for --once and --json.")] = 5.0,
) -> None:
    """Watch a running suite: verifiers, queues, speed, promises kept, and why each batch is as it is."""
    with errors_shown():
        from services.tools.cli.suite_address import choose_suite
        from services.tools.cli.suite_observer import live, once_seen
        from services.tools.local.folder import running_suites
        from services.tools.local.settings import BrokerAddresses, LocalSettings
        from shared.runtime import logging

        given = BrokerAddresses()
        where = choose_suite(amqp_url or given.amqp_url, namespace or LocalSettings().namespace, running_suites())
        where = replace(where, tls=given.tls)
        # Our dependencies' warnings would run across the screen; `top` says itself what is wrong.
        logging.configure("top", "top", "error", "console")
        if once or as_json or not out.is_terminal:
            run(lambda: once_seen(where, out, seconds, as_json=as_json))
            return
        with suppress(KeyboardInterrupt):  # how one leaves it
            run(lambda: live(where, out))
