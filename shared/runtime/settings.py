"""What every service is configured by; each service's own settings class adds to it.

Values come from the command line (`--help` lists them), then the environment (`WISP_` and the upper-case name), then
the defaults here. Nothing else in the product reads the environment.
"""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from secrets import token_hex
from typing import Literal, NoReturn, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
from yarl import URL

from shared.broker.seal import Seal
from shared.broker.topology import JournalLimits
from shared.errors import SettingsError as BadSettings
from shared.runtime.tls import Tls

SHORTEST_SECRET = 32
SECRET = frozenset({"session_secret", "api_key"})
"""Settings whose values are not shown."""
NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
HOST_LENGTH = 46
"""Of a host's name in a process's: a pod's name fits, and what is made of it is no longer than 64."""


AMQP_SCHEMES = ("amqp", "amqps")
REDIS_SCHEMES = ("redis", "rediss", "unix")
TLS_SCHEMES = ("amqps", "rediss")
TLS_IN_URL = ("cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl")
"""Options of URLs for which there are settings; with `ssl_…` those of Redis."""


class TlsSettings(BaseSettings):
    """How the certificates of RabbitMQ and Redis are checked, where their URLs say amqps and rediss."""

    model_config = SettingsConfigDict(env_prefix="WISP_", extra="ignore", frozen=True)

    tls_ca_file: Path | None = Field(
        default=None,
        description="authorities (PEM) that the certificates of RabbitMQ (amqps://) and Redis (rediss://) are checked "
        "against; default: the system's",
    )
    tls_cert_file: Path | None = Field(default=None, description="certificate (PEM) to show to RabbitMQ and Redis")
    tls_key_file: Path | None = Field(
        default=None, description="its key (PEM, without passphrase); default: in the same file"
    )

    @property
    def tls(self) -> Tls:
        """The three together."""
        return Tls(self.tls_ca_file, self.tls_cert_file, self.tls_key_file)

    @model_validator(mode="after")
    def _tls_is_usable(self) -> TlsSettings:
        urls = {name: getattr(self, name, None) for name in ("amqp_url", "redis_url")}
        schemes = [check_url(name, url) for name, url in urls.items() if url is not None]
        if self.tls_key_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_key_file is set, but not the certificate that it belongs to (WISP_TLS_CERT_FILE)")
        if self.tls == Tls():
            return self
        if schemes and not set(schemes) & set(TLS_SCHEMES):
            raise ValueError(
                "certificates are set (WISP_TLS_...), but nothing uses TLS: amqp_url begins with amqp:// and redis_url "
                "with redis://; make them amqps:// and rediss://, or take the certificates away"
            )
        try:
            self.tls.context()
        except BadSettings as error:
            raise ValueError(str(error)) from None
        return self


def check_url(name: str, text: str) -> str:
    """The scheme of a broker's URL. Raises ValueError, without its password, when it cannot be one."""
    allowed = AMQP_SCHEMES if name == "amqp_url" else REDIS_SCHEMES
    scheme = text.partition("://")[0]
    says = " or ".join(f"{each}://" for each in allowed)
    if scheme not in allowed:
        raise ValueError(f"{name} must begin with {says}")
    try:
        url = URL(text)
        named = url.host or scheme == "unix"
        _ = url.port
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).replace(text, '...')}") from None
    if not named:
        raise ValueError(f"{name} names no host; it looks like {allowed[0]}://user:password@host:port/")
    if twice := next((key for key in url.query if key in TLS_IN_URL or key.startswith("ssl_")), None):
        raise ValueError(f"{name} has the option {twice!r}; say it with WISP_TLS_CA_FILE, ..._CERT_FILE, ..._KEY_FILE")
    return scheme


class ServiceSettings(TlsSettings):
    """Settings that all services share."""

    model_config = SettingsConfigDict(
        env_prefix="WISP_",
        extra="ignore",
        frozen=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    amqp_url: str = Field("amqp://guest:guest@127.0.0.1:5672/", description="RabbitMQ, as an amqp:// or amqps:// URL")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis, as a redis:// or rediss:// URL")
    namespace: str = Field(
        "wisp", pattern=NAME_PATTERN, description="prefix of the exchange, the queues and the Redis keys"
    )
    instance: str = Field(
        "", description="this process's name, unique in the namespace; default: host name and a random part"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")
    log_format: Literal["json", "console"] = Field("json", description="log lines as JSON or for reading")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of /metrics for Prometheus, /live and /ready; 0 serves none"
    )
    metrics_host: str = Field("127.0.0.1", description="address of that port")
    session_ttl_s: int = Field(900, ge=10, description="seconds that a session's state is kept after its last token")
    journal: bool = Field(
        False, description="record messages in a stream queue for `wisp replay`; they hold the users' tokens"
    )
    journal_bytes: int = Field(1_000_000_000, ge=10_000_000, description="size of the journal at most, in bytes")
    journal_hours: float = Field(24.0, gt=0, le=8784, description="hours after which the journal forgets")

    @property
    def journal_limits(self) -> JournalLimits | None:
        """What the journal keeps; None where nothing is recorded."""
        return JournalLimits(self.journal_bytes, max(1, int(self.journal_hours * 3600))) if self.journal else None

    def instance_name(self, service: str) -> str:
        """The given instance name, or a fresh one made of service, host and a random part."""
        if self.instance:
            return self.instance
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:HOST_LENGTH]
        return f"{service}-{host}-{token_hex(3)}"


def host_of(service: str, instance: str) -> str:
    """The host in a name that `instance_name` made: in Kubernetes, the pod."""
    return instance.removeprefix(f"{service}-").rpartition("-")[0]


class SealSettings(ServiceSettings):
    """Settings of the services that make or check the keys of sessions."""

    session_secret: SecretStr | None = Field(
        None,
        description="secret of gateways, schedulers and verifiers, 32 characters at least: drafters then have to show "
        "a key for each session; needed where devices draft",
    )

    @property
    def seal(self) -> Seal:
        """Makes and checks the keys."""
        return Seal(None if self.session_secret is None else self.session_secret.get_secret_value())

    @model_validator(mode="after")
    def _secret_is_long(self) -> SealSettings:
        if self.session_secret is not None and len(self.session_secret.get_secret_value()) < SHORTEST_SECRET:
            raise ValueError(
                f"session_secret is shorter than {SHORTEST_SECRET} characters; make one with `openssl rand -hex 32`"
            )
        return self


class TargetSettings(ServiceSettings):
    """Settings of the services that need to know the target model."""

    target: Path = Field(
        Path(".wisp/models/smollm2-135m-instruct"), description="folder of the target model (Hugging Face layout)"
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="number format of the target's weights")


S = TypeVar("S", bound=ServiceSettings)


def load(kind: type[S], program: str) -> S:
    """Settings from command line, environment and defaults; bad ones end the process with a readable message."""
    try:
        return kind(_cli_parse_args=True, _cli_prog_name=program)  # type: ignore[call-arg]
    except ValidationError as error:
        _refuse(program, [f"  {problem}" for problem in problems_of(error)])
    except SettingsError as error:
        _refuse(program, [f"  {error}"])


def problems_of(error: ValidationError) -> list[str]:
    """What is wrong with settings, one after the other, for people."""
    problems = []
    for item in error.errors():
        name = "_".join(str(part) for part in item["loc"])
        given = "" if item["type"] == "missing" or name in SECRET else f" (given: {item['input']!r})"
        if name:
            problems.append(f"WISP_{name.upper()} or --{name.replace('_', '-')}: {item['msg']}{given}")
        else:  # settings that do not go together
            problems.append(item["msg"].removeprefix("Value error, "))
    return problems


def _refuse(program: str, problems: list[str]) -> NoReturn:
    print(f"{program}: bad settings\n" + "\n".join(problems) + f"\nSee `{program} --help`.", file=sys.stderr)
    raise SystemExit(2)
