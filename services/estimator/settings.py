"""Settings of the estimator."""

from __future__ import annotations

from pydantic import Field

from shared.runtime.settings import ServiceSettings


class EstimatorSettings(ServiceSettings):
    """One estimator process. Several may run; the broker makes one of them active."""

    forgetting: float = Field(0.99, gt=0.5, lt=1, description="weight of a batch relative to the next one")
    publish_ms: int = Field(500, ge=50, description="shortest time between two models of one verifier, in milliseconds")
