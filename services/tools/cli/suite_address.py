"""The address of the suite that a command observes: the named one, or the latest on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.tools.local.folder import RunningSuite, page_of, suites_by_api
from shared.errors import SettingsError
from shared.runtime.settings import NAME_PATTERN, ServiceSettings, check_url
from shared.runtime.tls import Tls


@dataclass(frozen=True)
class SuiteAddress:
    """A suite's broker and namespace."""

    amqp_url: str
    namespace: str
    note: str | None = None
    """A note for the user about the choice."""
    absent: str | None = None
    """A note for the user if no suite of this machine was chosen and the address is a default."""
    tls: Tls = field(default_factory=Tls)
    """Settings for the broker's certificate."""


NO_FLEET = "a baseline (`wisp up --serving`): one engine without drafters, schedulers and RabbitMQ, so nothing to watch"


def choose_suite(
    amqp_url: str | None, namespace: str | None, running: Sequence[RunningSuite], baselines: Sequence[str] = ()
) -> SuiteAddress:
    """Choose the suite to observe.

    amqp_url, namespace: from options or environment. running: suites on this machine, the latest first. A missing value
    comes from the latest suite that matches the other, else from the services' defaults. baselines: URLs of the APIs of
    this machine that have no suite behind them. Raises SettingsError.
    """
    if namespace is not None and not re.fullmatch(NAME_PATTERN, namespace):
        raise SettingsError(f"namespace {namespace!r}: use up to 64 letters, digits, _ and -")
    if amqp_url is not None:
        try:
            check_url("amqp_url", amqp_url)
        except ValueError as error:
            raise SettingsError(f"the address of RabbitMQ (--amqp-url): {error}") from None
    defaults = {name: field.default for name, field in ServiceSettings.model_fields.items()}
    fitting = [
        suite
        for suite in running
        if namespace in (None, suite.namespace) and (amqp_url is None or suite.amqp_url in (None, amqp_url))
    ]
    if not fitting:
        absent = None
        if amqp_url is None:
            absent = f"no suite {namespace} runs on this machine" if namespace else "no suite runs on this machine"
            if baselines and not running:
                absent += f" ({baselines[0]} is {NO_FLEET})"
            if running:
                absent += f", but {', '.join(suite.namespace for suite in running)}"
        return SuiteAddress(amqp_url or defaults["amqp_url"], namespace or defaults["namespace"], absent=absent)
    suite, others = fitting[0], fitting[1:]
    url = amqp_url or suite.amqp_url
    if url is None:
        raise SettingsError(
            f"suite {suite.namespace} uses brokers that it did not start: give the address of RabbitMQ with "
            "--amqp-url or WISP_AMQP_URL"
        )
    note = None
    if others:
        note = f"other suites on this machine (--namespace): {', '.join(other.namespace for other in others)}"
    return SuiteAddress(url, suite.namespace, note)


def suites_at(url: str, runs: Path | None = None) -> list[RunningSuite]:
    """Return the suite of this machine whose API has this URL, for `choose_suite`. Raises SettingsError for none.

    A gateway does not tell where its RabbitMQ is, so suites elsewhere are named by that.
    """
    apis = suites_by_api(runs)
    for api, suite in apis.items():
        if _place(api.url) == _place(url):
            if suite is None:
                raise SettingsError(f"{url} is {NO_FLEET}; its figures are at {page_of(url)}metrics")
            return [suite]
    others = f" (suites here: {', '.join(api.url for api in apis)})" if apis else ""
    raise SettingsError(
        f"no suite of `wisp up` on this machine serves {url}{others}; `wisp top` reads messages at RabbitMQ: name "
        "that of another machine's suite with --amqp-url and --namespace"
    )


def baselines_here(runs: Path | None = None) -> list[str]:
    """Return the URLs of the APIs of this machine that have no suite behind them."""
    return [api.url for api, suite in suites_by_api(runs).items() if suite is None]


def _place(url: str) -> str:
    return page_of(url).lower().replace("//localhost", "//127.0.0.1")
