"""The address of the suite that a command observes: the named one, or the latest on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.tools.local.folder import RunningSuite
from shared.errors import SettingsError
from shared.runtime.settings import NAME_PATTERN, ServiceSettings
from shared.runtime.tls import Tls


@dataclass(frozen=True)
class SuiteAddress:
    """A suite's broker and namespace."""

    amqp_url: str
    namespace: str
    note: str | None = None
    """A note for the user about the choice."""
    tls: Tls = field(default_factory=Tls)
    """Settings for the broker's certificate."""


def choose_suite(amqp_url: str | None, namespace: str | None, running: Sequence[RunningSuite]) -> SuiteAddress:
    """Choose the suite to observe.

    amqp_url, namespace: from options or environment. running: suites on this machine, the latest first. A missing value
    comes from the latest suite that matches the other, else from the services' defaults. Raises SettingsError.
    """
    if namespace is not None and not re.fullmatch(NAME_PATTERN, namespace):
        raise SettingsError(f"namespace {namespace!r}: use up to 64 letters, digits, _ and -")
    if amqp_url is not None and not re.match("amqps?://.", amqp_url):
        raise SettingsError("the address of RabbitMQ (--amqp-url, WISP_AMQP_URL) must begin with amqp:// or amqps://")
    defaults = {name: field.default for name, field in ServiceSettings.model_fields.items()}
    fitting = [
        suite
        for suite in running
        if namespace in (None, suite.namespace) and (amqp_url is None or suite.amqp_url in (None, amqp_url))
    ]
    if not fitting:
        return SuiteAddress(amqp_url or defaults["amqp_url"], namespace or defaults["namespace"])
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
