"""What the gateway is configured by."""

from __future__ import annotations

from pydantic import Field, field_validator

from shared.messages import DEFAULT_CLASS, Slo
from shared.settings import TargetSettings


class GatewaySettings(TargetSettings):
    """Settings of the gateway."""

    host: str = Field("127.0.0.1", description="address of the HTTP API")
    port: int = Field(8000, ge=0, le=65535, description="port of the HTTP API; 0 takes a free one")
    model_name: str = Field("", description="the model's name in the API; default: the name of the target's folder")
    max_sessions: int = Field(256, ge=1, description="texts generated at once; what is over it gets a 429")
    max_choices: int = Field(16, ge=1, le=128, description="most texts of one request: prompts times n")
    max_body_bytes: int = Field(2 << 20, ge=1024, description="longest request body, in bytes")
    body_timeout_s: float = Field(60, gt=0, description="seconds that a client may take to send its request's body")
    idle_check_s: float = Field(
        2, gt=0, description="seconds without news of a session after which its state is read from Redis"
    )
    stall_timeout_s: float = Field(60, gt=0, description="seconds without progress after which a session is given up")
    drain_s: float = Field(20, ge=0, description="seconds that running requests may take to end after SIGTERM")
    slo_classes: dict[str, Slo | None] = Field(
        {
            "priority": Slo(ttft_ms=500, tpot_ms=50),
            DEFAULT_CLASS: Slo(ttft_ms=2000, tpot_ms=200),
            "flex": None,
        },
        description="speed promise of each service_tier, as JSON; null promises nothing; `default` is for all others",
    )

    @field_validator("slo_classes")
    @classmethod
    def _has_default(cls, classes: dict[str, Slo | None]) -> dict[str, Slo | None]:
        if classes.get(DEFAULT_CLASS) is None:
            raise ValueError(
                f"the class {DEFAULT_CLASS!r} is missing or null; it completes requests with one SLO header"
            )
        return classes
