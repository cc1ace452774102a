"""`wisp top`: the live state of a running suite."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from services.tools.cli.shared_options import AmqpUrlOption, NamespaceOption
from services.tools.cli.terminal import errors_shown, out, quiet_broker_client, run


def top(
    namespace: NamespaceOption = None,
    amqp_url: AmqpUrlOption = None,
    url: Annotated[
        str | None, typer.Option("--url", help="API of a suite of `wisp up` on this machine, as for `wisp chat`.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Observe for --seconds, print once and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Observe for --seconds and print JSON.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of observation for --once and --json.")] = 5.0,
) -> None:
    """Watch a running suite: verifiers, queues, speed, SLO attainment, and the reasons behind each batch."""
    with errors_shown():
        from services.tools.cli.suite_address import baselines_here, choose_suite, suites_at
        from services.tools.cli.suite_observer import live, once_seen
        from services.tools.local.folder import running_suites
        from services.tools.local.settings import BrokerAddresses, LocalSettings
        from shared.runtime import logging

        given = BrokerAddresses()
        if url is None:
            suite = choose_suite(
                amqp_url or given.amqp_url, namespace or LocalSettings().namespace, running_suites(), baselines_here()
            )
        else:
            suite = choose_suite(amqp_url or given.amqp_url, namespace, suites_at(url))
        suite = replace(suite, tls=given.tls)
        # Warnings of dependencies would run across the screen; `top` shows problems itself.
        logging.configure("top", "top", "error", "console")
        quiet_broker_client()
        if once or as_json or not out.is_terminal:
            run(lambda: once_seen(suite, out, seconds, as_json=as_json))
            return
        with suppress(KeyboardInterrupt):  # Ctrl-C ends `wisp top`
            run(lambda: live(suite, out))
