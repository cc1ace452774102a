"""A service's settings as an environment file for containers, Kubernetes and systemd."""

from __future__ import annotations

import textwrap

from services.tools.local.service_settings import settings_class
from shared.errors import WispError
from shared.runtime.settings import WispSettings, variable
from shared.runtime.settings_loading import as_variable

DEPLOYED = ("gateway", "drafter", "scheduler", "estimator", "verifier", "drainorder")
"""The services that containers run."""
SECRET = frozenset({"amqp_url", "redis_url", "session_secret"})
"""Settings that come from a secret and are never written to a file."""
WIDTH = 118


def settings_of(service: str) -> type[WispSettings]:
    """Return a service's settings class. Raises WispError for an unknown service."""
    if service not in DEPLOYED:
        raise WispError(f"there is no service {service!r}; the services are {', '.join(DEPLOYED)}")
    return settings_class(service)


def environment(kind: type[WispSettings]) -> str:
    """Format every setting with its description and default; secrets and settings without a default as comments."""
    parts = []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        description = textwrap.fill(
            field.description or "", WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        if name in SECRET:
            parts.append(f"{description}\n# {variable(name)} comes from a secret")
        elif default in (None, ""):
            parts.append(f"{description}\n# {variable(name)} is not set")
        else:
            parts.append(f"{description}\n{variable(name)}={as_variable(default)}")
    return "\n".join(parts) + "\n"
