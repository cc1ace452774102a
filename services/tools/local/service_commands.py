"""The command line and environment of each service's process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.baseline.settings import Baseline

Serving = Literal["wisp", Baseline]
"""The suite, or a baseline that it is measured against."""
SERVICES = ("gateway", "drafter", "scheduler", "estimator", "verifier", "baseline")
API_SERVICES = ("gateway", "baseline")
"""Services with an HTTP API."""
STOP_ORDER = (*API_SERVICES, "drafter", "scheduler", "verifier", "estimator")
"""Services that accept requests stop first; those that only listen stop last."""
NOT_INHERITED = frozenset({"WISP_METRICS_PORT", "WISP_INSTANCE", "WISP_PORT", "WISP_HOST"})
"""Settings of a single process, which would collide if several processes inherited them."""
DRAIN_S = 5


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class ServiceCommands:
    """The settings that the services of one stack share."""

    namespace: str
    amqp_url: str
    redis_url: str
    target: Path
    host: str
    port: int
    verifiers: int
    """Verifiers that share the cores."""
    serving: Serving = "wisp"
    env: Mapping[str, str] = field(default_factory=dict)
    inherited: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def command(self, service: str) -> list[str]:
        """Return a service's command line."""
        return [sys.executable, "-m", f"services.{service}"]

    def environment(self, service: str, name: str, own: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the process `name`. Variables in `own` take precedence."""
        inherited = {key: value for key, value in self.inherited.items() if key not in NOT_INHERITED}
        defaults = {"WISP_DRAIN_S": str(DRAIN_S)}
        if service in ("verifier", "baseline"):
            defaults["WISP_THREADS"] = str(max(1, cores() // max(1, self.verifiers)))
        if not inherited.get("WISP_DEVICE", "cpu").startswith("cpu"):
            # Only CPUs compute with a GGUF file's blocks, and all services must agree on the format.
            defaults["WISP_DTYPE"] = "bfloat16"
        fixed = {
            "WISP_NAMESPACE": self.namespace,
            "WISP_INSTANCE": name,
            "WISP_TARGET": str(self.target),
            "WISP_LOG_FORMAT": "json",
        }
        if service != "baseline":
            fixed |= {"WISP_AMQP_URL": self.amqp_url, "WISP_REDIS_URL": self.redis_url}
        if service in API_SERVICES:
            fixed |= {"WISP_HOST": self.host, "WISP_PORT": str(self.port)}
        if service == "baseline":
            fixed["WISP_SERVING"] = self.serving
        merged = {**defaults, **inherited, **fixed, **self.env, **own}
        # Waiting threads must not spin: other processes need the cores.
        merged.setdefault("OMP_WAIT_POLICY", "passive")
        merged["OMP_NUM_THREADS"] = own.get("OMP_NUM_THREADS", merged.get("WISP_THREADS", "1"))
        merged["PYTHONUNBUFFERED"] = "1"
        return merged
