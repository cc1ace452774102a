"""What the gateway is configured by."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from services.gateway.core.keys import KeyLimits
from services.gateway.core.slo import ServiceClass
from shared.errors import SettingsError
from shared.messages import DEFAULT_CLASS, Name
from shared.runtime.settings import ServiceSettings, SessionSecretSettings, SessionTtlSettings, TargetSettings
from shared.runtime.tls import server_context

ADMIT_TO = {"priority": 1.0, "flex": 0.8}
"""`admit_to` of classes that are given without it."""
OTHERS_ADMIT_TO = 0.9
STANDARD_CLASSES: Any = {
    "priority": {"ttft_ms": 500, "tpot_ms": 50},
    DEFAULT_CLASS: {"ttft_ms": 2000, "tpot_ms": 200},
    "flex": None,
}
"""As they are given in JSON."""


class GatewaySettings(ServiceSettings, TargetSettings, SessionTtlSettings, SessionSecretSettings):
    """Settings of the gateway."""

    host: str = Field("127.0.0.1", description="address of the HTTP API")
    port: int = Field(8000, ge=0, le=65535, description="port of the HTTP API; 0 takes a free one")
    https_cert_file: Path | None = Field(
        None, description="the API's certificate (PEM), read again when it is renewed; none: the API speaks plain HTTP"
    )
    https_key_file: Path | None = Field(
        None, description="its key (PEM, without passphrase); default: in the same file"
    )
    api_keys_file: Path | None = Field(
        None,
        description="file of the API keys that are good (wisp keys new), read again when it changes; none: no "
        "keys are asked for, and the API is on loopback only",
    )
    unsafe_serve_everybody: bool = Field(
        False, description="listen beyond loopback without API keys, so that everybody who can reach it uses it"
    )
    key_requests_per_minute: int | None = Field(
        None, ge=1, description="for API keys that have no such limit of their own"
    )
    key_tokens_per_minute: int | None = Field(
        None, ge=1, description="prompt and output tokens, for API keys that have no such limit of their own"
    )
    key_max_sessions: int | None = Field(
        None, ge=1, description="texts generated at once, for API keys that have no such limit of their own"
    )
    model_name: str = Field("", description="the model's name in the API; default: the name of the target's folder")
    max_sessions: int = Field(256, ge=1, description="texts generated at once; what is over it gets a 429")
    max_choices: int = Field(16, ge=1, le=128, description="most texts of one request: prompts times n")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; default: what fits the model")
    max_output_tokens: int | None = Field(None, ge=1, description="most output tokens of a text; default: what fits")
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

    @property
    def key_limits(self) -> KeyLimits:
        """The limits of keys that have none of their own."""
        return KeyLimits(
            requests_per_minute=self.key_requests_per_minute,
            tokens_per_minute=self.key_tokens_per_minute,
            max_sessions=self.key_max_sessions,
        )

    @model_validator(mode="after")
    def _is_not_open(self) -> GatewaySettings:
        refuse_open(self.host, self.api_keys_file, self.unsafe_serve_everybody)
        return self

    @model_validator(mode="after")
    def _https_is_usable(self) -> GatewaySettings:
        if self.https_cert_file is None:
            if self.https_key_file is not None:
                raise ValueError("https_key_file is set, but not its certificate (WISP_HTTPS_CERT_FILE)")
            return self
        try:
            server_context(self.https_cert_file, self.https_key_file, "https")
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

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


def refuse_open(host: str, api_keys_file: Path | None, unsafe: bool = False) -> None:
    """Raise ValueError where everybody on a network could use the API."""
    if not is_loopback(host) and api_keys_file is None and not unsafe:
        raise ValueError(
            f"host is {host!r}, so others can reach the API, but it asks for no API keys: make one with "
            "`wisp keys new NAME --file FILE` and name its file (WISP_API_KEYS_FILE), or stay on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
