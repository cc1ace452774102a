"""A service's settings as an environment file for containers, Kubernetes and systemd."""

from __future__ import annotations

import json
import textwrap
from importlib import import_module
from typing import Any

from pydantic_core import to_jsonable_python

from shared.errors import WispError
from shared.runtime.settings import WispSettings

OWN = {
    "gateway": ("services.gateway.settings", "GatewaySettings"),
    "drafter": ("services.drafter.settings", "DrafterSettings"),
    "scheduler": ("services.scheduler.settings", "SchedulerSettings"),
    "estimator": ("services.estimator.settings", "EstimatorSettings"),
    "verifier": ("services.verifier.settings", "VerifierSettings"),
    "drainorder": ("services.drain_order.settings", "DrainOrderSettings"),
}
"""Module and name of the settings class of each deployed service."""
SECRET = frozenset({"amqp_url", "redis_url", "session_secret"})
"""Settings that come from a secret and are never written to a file."""
WIDTH = 118


def settings_of(service: str) -> type[WispSettings]:
    """Return a service's settings class. Raises WispError for an unknown service."""
    if service not in OWN:
        raise WispError(f"there is no service {service!r}; the services are {', '.join(OWN)}")
    module, name = OWN[service]
    kind: type[WispSettings] = getattr(import_module(module), name)
    return kind


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{WispSettings.model_config['env_prefix']}{name.upper()}"


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
            parts.append(f"{description}\n{variable(name)}={_text(default)}")
    return "\n".join(parts) + "\n"


def _text(value: Any) -> str:
    plain = to_jsonable_python(value)
    return plain if isinstance(plain, str) else json.dumps(plain)
