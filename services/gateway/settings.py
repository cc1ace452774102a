"""What the gateway is configured by."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from services.gateway.slo import ServiceClass
from shared.messages import DEFAULT_CLASS, Name
from shared.settings import TargetSettings

ADMIT_TO = {"priority": 1.0, "flex": 0.8}
"""`admit_to` of classes that are given without it."""
OTHERS_ADMIT_TO = 0.9
STANDARD_CLASSES: Any = {
    "priority": {"ttft_ms": 500, "tpot_ms": 50},
    DEFAULT_CLASS: {"ttft_ms": 2000, "tpot_ms": 200},
    "flex": None,
}
"""As they are given in JSON."""


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
    resume_s: float = Field(
        30,
        ge=1,
        description="seconds that a text goes on while no gateway collects it, after its gateway died or its client "
        "went away that may come back; then it is cancelled",
    )
    drain_s: float = Field(20, ge=0, description="seconds that running requests may take to end after SIGTERM")
    admission: bool = Field(
        True,
        description="refuse requests whose promise the present load would break, theirs or others'; false: only "
        "the limits of sessions and backlog refuse",
    )
    max_backlog_ms: float = Field(
        30000,
        gt=0,
        description="milliseconds of work waiting for the verifiers over which requests get a 429; each "
        "class has its admit_to of it",
    )
    slo_classes: dict[Name, ServiceClass] = Field(
        STANDARD_CLASSES,
        description="what each service_tier is promised (ttft_ms, tpot_ms; null promises nothing), the share of the "
        "verifiers' time up to which it is taken (admit_to), and its own limit of texts (max_sessions), as JSON; "
        "`default` is for all others",
    )

    @field_validator("slo_classes", mode="before")
    @classmethod
    def _null_promises_nothing(cls, classes: object) -> object:
        if not isinstance(classes, dict):
            return classes
        return {
            name: {"admit_to": ADMIT_TO.get(name, OTHERS_ADMIT_TO)} | (given or {})
            if given is None or isinstance(given, dict)
            else given
            for name, given in classes.items()
        }

    @field_validator("slo_classes")
    @classmethod
    def _has_default(cls, classes: dict[str, ServiceClass]) -> dict[str, ServiceClass]:
        if DEFAULT_CLASS not in classes or classes[DEFAULT_CLASS].slo is None:
            raise ValueError(
                f"the class {DEFAULT_CLASS!r} is missing or promises nothing; it completes requests with one SLO header"
            )
        return classes
