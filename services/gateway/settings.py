"""Settings of the HTTP API and of the gateway."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.gateway.core.admission import ServiceClass
from shared.errors import SettingsError
from shared.messages import DEFAULT_CLASS, Name
from shared.runtime.settings import (
    ServiceSettings,
    SessionSecretSettings,
    SessionTtlSettings,
    TargetSettings,
    WispSettings,
)
from shared.runtime.tls import server_context

ADMIT_TO = {"priority": 1.0, "flex": 0.8}
"""Default `admit_to` of these classes."""
OTHERS_ADMIT_TO = 0.9
STANDARD_CLASSES: Any = {
    "priority": {"ttft_ms": 500, "tpot_ms": 50},
    DEFAULT_CLASS: {"ttft_ms": 2000, "tpot_ms": 200},
    "flex": None,
}
"""In the form of the setting's JSON."""


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s,]+")
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+")

Limit = Annotated[int, Field(ge=1)]


class KeyLimits(BaseModel):
    """Limits of one key over all gateways; None for no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Prompt and output tokens."""
    max_sessions: Limit | None = None
    """Running completions."""


class AllowedHostsSettings(WispSettings):
    """The names by which an API without keys may be reached."""

    allowed_hosts: str = Field(
        "",
        description="host names, separated by commas, that requests without API keys may name in their Host header "
        "besides loopback names and IP addresses (* for any), against pages in browsers (DNS rebinding)",
    )

    @property
    def allowed_host_names(self) -> list[str]:
        """The names of `allowed_hosts`."""
        return _listed(self.allowed_hosts)

    @field_validator("allowed_hosts")
    @classmethod
    def _are_host_names(cls, text: str) -> str:
        for name in _listed(text):
            if name != "*" and not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no host name; a host name looks like wisp.example.org, without a port")
        return text


class ApiSettings(TargetSettings, AllowedHostsSettings):
    """Settings of the HTTP API, which the gateway and the baselines serve."""

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
        description="file of the valid API keys (wisp keys new), read again when it changes; none: no keys are "
        "required, and the API is on loopback only",
    )
    cors_origins: str = Field(
        "",
        description="origins, separated by commas, whose pages may use the API from a browser, such as "
        "https://chat.example.org (* for all); none: no CORS",
    )
    unsafe_serve_everybody: bool = Field(
        False, description="listen beyond loopback without API keys, so that everybody who can reach the API can use it"
    )
    model_name: str = Field("", description="the model's name in the API; default: the name of the target's folder")
    generation_config: Literal["auto", "ignore"] = Field(
        "auto",
        description="temperature, top_p and top_k of requests that name none: auto: those of the model's "
        "generation_config.json, if it has them; ignore: 1, 1 and off, as in OpenAI's API",
    )
    max_sessions: int = Field(256, ge=1, description="most running completions; requests beyond them get a 429")
    max_choices: int = Field(16, ge=1, le=128, description="most completions of one request: prompts times n")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; default: what fits the model")
    max_output_tokens: int | None = Field(
        None, ge=1, description="most output tokens of a completion; default: what fits"
    )
    max_body_bytes: int = Field(2 << 20, ge=1024, description="longest request body, in bytes")
    head_timeout_s: float = Field(
        30, gt=0, le=60, description="seconds that a client may take to send the head of a request it has begun"
    )
    keep_alive_s: int = Field(
        75, ge=1, description="seconds that a connection without a request stays open; more than a proxy before it has"
    )
    body_timeout_s: float = Field(60, gt=0, description="seconds that a client may take to send its request's body")
    stall_timeout_s: float = Field(
        60, gt=0, description="seconds in which nobody works on a session after which it ends with a 504"
    )
    queue_timeout_s: float = Field(
        600,
        gt=0,
        description="seconds that a session may wait for its turn, while others are served before it, before it ends "
        "with a 503",
    )
    drain_s: float = Field(20, ge=0, description="seconds that running requests may take to end after SIGTERM")
    slo_classes: dict[Name, ServiceClass] = Field(
        STANDARD_CLASSES,
        description="SLO of each service_tier (ttft_ms, tpot_ms; null promises nothing), the promised share of the "
        "verifiers' time up to which it is promised to more requests (admit_to), and its own limit of running "
        "completions (max_sessions), as JSON; requests of other tiers or none count as `default`, without its SLO",
    )

    @property
    def allowed_origins(self) -> list[str]:
        """The origins of `cors_origins`."""
        return _listed(self.cors_origins)

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        for origin in _listed(text):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; an origin looks like https://chat.example.org or *")
        return text

    @model_validator(mode="after")
    def _is_not_open(self) -> ApiSettings:
        refuse_open(self.host, self.api_keys_file, self.unsafe_serve_everybody)
        return self

    @model_validator(mode="after")
    def _https_is_usable(self) -> ApiSettings:
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


class GatewaySettings(ServiceSettings, ApiSettings, SessionTtlSettings, SessionSecretSettings):
    """Settings of the gateway."""

    key_requests_per_minute: int | None = Field(
        None, ge=1, description="for API keys that have no such limit of their own"
    )
    key_tokens_per_minute: int | None = Field(
        None, ge=1, description="prompt and output tokens, for API keys that have no such limit of their own"
    )
    key_max_sessions: int | None = Field(
        None, ge=1, description="running completions, for API keys that have no such limit of their own"
    )
    idle_check_s: float = Field(
        2, gt=0, description="seconds without results of a session after which its state is read from Redis"
    )
    outage_wait_s: float = Field(
        10,
        ge=0,
        description="seconds that a new request waits for verifiers or Redis when they fall silent, as in a pause of "
        "the machine, before it gets a 503",
    )
    resume_s: float = Field(
        30,
        ge=1,
        description="seconds that a completion goes on while no gateway collects it, after its gateway died or its "
        "client, which may come back, went away; then it is cancelled",
    )
    admission: bool = Field(
        True,
        description="refuse requests that ask for an SLO if the present load would break it, or they that of others; "
        "false: only the limits of sessions and backlog refuse",
    )
    max_backlog_ms: float = Field(
        300000,
        gt=0,
        description="milliseconds of pending work for the verifiers above which requests get a 429; each class is "
        "limited to its admit_to of it",
    )

    @property
    def key_limits(self) -> KeyLimits:
        """Limits of keys that have none of their own."""
        return KeyLimits(
            requests_per_minute=self.key_requests_per_minute,
            tokens_per_minute=self.key_tokens_per_minute,
            max_sessions=self.key_max_sessions,
        )


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def refuse_open(host: str, api_keys_file: Path | None, unsafe: bool = False) -> None:
    """Raise ValueError when everybody on a network could use the API."""
    if not is_loopback(host) and api_keys_file is None and not unsafe:
        raise ValueError(
            f"host is {host!r}, so others can reach the API, but it requires no API keys: make one with "
            "`wisp keys new NAME --file FILE` and set WISP_API_KEYS_FILE to its file, or stay on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
