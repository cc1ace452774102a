"""Which suite to observe: the one that is named, or the one that runs on this machine. Pure."""

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
    """What the user should know of the choice."""
    tls: Tls = field(default_factory=Tls)
    """How the broker's certificate is checked."""


def choose_suite(amqp_url: str | None, namespace: str | None, running: Sequence[RunningSuite]) -> SuiteAddress:
    """The suite to observe.

    amqp_url, namespace: as given by options or environment. running: suites on this machine, the latest first. What is
    given counts; what is not is taken from the latest suite that fits it, and else from the services' defaults. Raises
    SettingsError.
    """
    if namespace is not None and not re.fullmatch(NAME_PATTERN, namespace):
        raise SettingsError(f"namespace {namespace!r}: letters, digits, _ and - only, 64 at most")
    if amqp_url is not None and not re.match("amqps?://.", amqp_url):
        raise SettingsError("the address of RabbitMQ (--amqp-url, WISP_AMQP_URL) begins with amqp:// or amqps://")
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
            f"suite {suite.namespace} runs on brokers that somebody else runs; say where RabbitMQ is: --amqp-url, or "
            "WISP_AMQP_URL"
        )
    note = None
    if others:
        note = f"other suites run here too (--namespace): {', '.join(other.namespace for other in others)}"
    return SuiteAddress(url, suite.namespace, note)
