"""The parts of a gateway that its routes share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from services.gateway.core.admission import Admission
from services.gateway.keys import KeyFile
from services.gateway.ledger import Ledger
from services.gateway.metrics import ModelMetrics
from services.gateway.model import ServedModel
from services.gateway.page.feed import FleetFeed
from services.gateway.schema import NO_DEFAULTS
from services.gateway.sessions import Sessions
from services.gateway.settings import ApiSettings
from services.gateway.transport import Transport
from shared.models.generation import SamplingDefaults


class Upstream(Protocol):
    """The services behind the gateway."""

    async def longest_session(self, needs: Collection[str] = ()) -> int:
        """Return the most tokens of a session that some verifier takes, with the features that the session needs.

        Raises ApiError when there is none.
        """

    async def missing(self) -> dict[str, str | None]:
        """Return each required service with its problem, or None."""


@dataclass(frozen=True)
class Gateway:
    """One gateway."""

    settings: ApiSettings
    instance: str
    model: ServedModel
    transport: Transport
    sessions: Sessions
    upstream: Upstream
    ledger: Ledger
    keys: KeyFile | None = None
    """The valid API keys; None serves everybody."""
    feed: FleetFeed | None = None
    """The feed of the fleet view; None where there is no fleet."""
    sampling_defaults: SamplingDefaults = NO_DEFAULTS
    """Sampling of requests that name none."""

    @classmethod
    def assemble(
        cls,
        settings: ApiSettings,
        instance: str,
        model: ServedModel,
        transport: Transport,
        upstream: Upstream,
        *,
        ledger: Ledger | None = None,
        keys: KeyFile | None = None,
        feed: FleetFeed | None = None,
        admission: Admission | None = None,
        idle_check_s: float = math.inf,
        arithmetics: Callable[[], Collection[str]] = tuple,
    ) -> Gateway:
        """Put a gateway together that serves a model over a transport.

        By default nothing is charged, only the limits on running completions refuse requests, no results are lost, and
        the verifiers' arithmetics are unknown.
        """
        sessions = Sessions(
            transport,
            model,
            admission or Admission(settings.slo_classes, settings.max_sessions),
            ModelMetrics(model.name),
            stall_timeout_s=settings.stall_timeout_s,
            queue_timeout_s=settings.queue_timeout_s,
            idle_check_s=idle_check_s,
            arithmetics=arithmetics,
        )
        defaults = model.folder.sampling if settings.generation_config == "auto" else NO_DEFAULTS
        return cls(settings, instance, model, transport, sessions, upstream, ledger or Ledger(), keys, feed, defaults)
