"""Base classes of the services' settings. `shared.runtime.settings_loading` loads them.

A service's settings class inherits the bases of what the service uses: `ProcessSettings`, `BrokerSettings`,
`JournalSettings`, `RedisSettings`, `SessionTtlSettings`, `SessionSecretSettings`, `TargetSettings`.

A value comes from the command line (`--help` lists the options), else from the environment (`WISP_` and the upper-case
name; an empty variable counts as unset), else from the default here. Nothing else in the product reads the environment,
except for OpenTelemetry's own variables (`shared.runtime.tracing`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from yarl import URL

from shared.broker.connection import addresses
from shared.broker.session_keys import SessionKeys
from shared.broker.topology import JournalLimits, Topology
from shared.errors import SettingsError, in_words
from shared.runtime.tls import Tls
from shared.state.commits import SESSION_TTL_S

SHORTEST_SECRET = 32
NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
HOST_LENGTH = 46
"""Characters of a host name that go into an instance name: a pod's name fits, and the instance name has at most 64."""

AMQP_SCHEMES = ("amqp", "amqps")
REDIS_SCHEMES = ("redis", "rediss", "unix")
AMQP_EXAMPLE = "amqp://user:password@127.0.0.1:5672/"
REDIS_EXAMPLE = "redis://:password@127.0.0.1:6379/0"
TLS_SCHEMES = ("amqps", "rediss")
TLS_IN_URL = ("cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl")
"""URL options that have a setting of their own. The `ssl_…` options of Redis URLs count too."""


class _Environment(EnvSettingsSource):
    """The variables of an environment. Empty ones count as unset."""

    def __init__(self, kind: type[BaseSettings], environment: Mapping[str, str]) -> None:
        super().__init__(kind)
        self.env_vars = {name.lower(): value for name, value in environment.items() if value.strip()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Decode JSON. Other text stays as it is: the check of the field then refuses it by its variable's name."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class WispSettings(BaseSettings):
    """Base of all settings: immutable, from options and `WISP_…` variables."""

    model_config = SettingsConfigDict(
        env_prefix="WISP_",
        extra="ignore",
        frozen=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )
    environment: ClassVar[Mapping[str, str]] = os.environ
    """The variables that values come from."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from arguments, then from the environment."""
        return init_settings, _Environment(settings_cls, cls.environment)


class ProcessSettings(WispSettings):
    """Settings of every service process: its name, its logs and its metrics port."""

    instance: str = Field(
        "", description="name of this process, unique in the namespace; default: host name and a random part"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="format of log lines: json for machines, console for people; auto: console in a terminal"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of /metrics (Prometheus), /live and /ready; 0 opens no port"
    )
    metrics_host: str = Field("127.0.0.1", description="address of the metrics port")

    def instance_name(self, service: str) -> str:
        """Return the given instance name, or a new one made of service, host and a random part."""
        if self.instance:
            return self.instance
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:HOST_LENGTH]
        return f"{service}-{host}-{token_hex(3)}"


def host_of(service: str, instance: str) -> str:
    """Return the host in a name made by `instance_name`; in Kubernetes, the pod."""
    return instance.removeprefix(f"{service}-").rpartition("-")[0]


class TlsSettings(WispSettings):
    """TLS files for connections to RabbitMQ and Redis, used where a URL begins with amqps:// or rediss://."""

    tls_ca_file: Path | None = Field(
        default=None,
        description="certificate authorities (PEM) that RabbitMQ (amqps://) and Redis (rediss://) are checked "
        "against; default: those of the system",
    )
    tls_cert_file: Path | None = Field(
        default=None, description="client certificate (PEM) to show to RabbitMQ and Redis"
    )
    tls_key_file: Path | None = Field(
        default=None,
        description="private key (PEM, without passphrase) of the client certificate; default: in the same file",
    )

    @property
    def tls(self) -> Tls:
        """The three files together."""
        return Tls(self.tls_ca_file, self.tls_cert_file, self.tls_key_file)

    @model_validator(mode="after")
    def _tls_is_usable(self) -> TlsSettings:
        urls = {name: getattr(self, name, None) for name in ("amqp_url", "redis_url")}
        schemes = {
            name: check_url(name, url)
            for name, text in urls.items()
            if text is not None
            for url in (addresses(text) if name == "amqp_url" else [text])
        }
        if self.tls_key_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_key_file is set without its certificate; set WISP_TLS_CERT_FILE too")
        if self.tls == Tls():
            return self
        if schemes and not set(schemes.values()) & set(TLS_SCHEMES):
            plain = " and ".join(f"{variable(name)} begins with {scheme}://" for name, scheme in schemes.items())
            raise ValueError(
                f"TLS files are set (WISP_TLS_...), but nothing uses TLS: {plain}; use amqps:// or rediss://, or "
                "remove the files"
            )
        try:
            self.tls.context()
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self


def check_url(name: str, text: str) -> str:
    """Return the scheme of a RabbitMQ or Redis URL.

    name: the setting's. Raises ValueError, without the URL's password, when the URL is malformed.
    """
    allowed = AMQP_SCHEMES if name == "amqp_url" else REDIS_SCHEMES
    example = AMQP_EXAMPLE if name == "amqp_url" else REDIS_EXAMPLE
    called = variable(name)
    scheme, _, rest = text.partition("://")
    if scheme not in allowed:
        expected = " or ".join(f"{each}://" for each in allowed)
        raise ValueError(f"{called} must begin with {expected}, for example {example}")
    if scheme != "unix" and (reserved := _reserved_in_login(rest)):
        raise ValueError(
            f"{called}: the URL contains {reserved!r}; in a user's name or password write %{ord(reserved):02X} instead"
        )
    try:
        url = URL(text)
        named = url.host or scheme == "unix"
        _ = url.port
    except ValueError as error:
        raise ValueError(f"{called}: {str(error).replace(text, '...')}; expected the form {example}") from None
    if not named:
        raise ValueError(f"{called} names no host; expected the form {example}")
    if option := next((key for key in url.query if key in TLS_IN_URL or key.startswith("ssl_")), None):
        raise ValueError(
            f"{called} has the option {option!r}; use WISP_TLS_CA_FILE, WISP_TLS_CERT_FILE and WISP_TLS_KEY_FILE "
            "instead"
        )
    return scheme


def _reserved_in_login(rest: str) -> str | None:
    """Return a character that cuts a URL's user or password short; None if there is none. rest: all after `://`."""
    if "#" in rest:
        return "#"
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    remainder = rest[len(authority) :]
    is_address = re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", authority)
    return remainder[0] if "@" in remainder and "@" not in authority and not is_address else None


class NamespaceSettings(WispSettings):
    """The namespace, which keeps deployments on one broker and one Redis apart."""

    namespace: str = Field(
        "wisp", pattern=NAME_PATTERN, description="prefix of the exchange, the queues and the Redis keys"
    )


class BrokerSettings(TlsSettings, NamespaceSettings):
    """Settings of processes that connect to RabbitMQ."""

    amqp_url: str = Field(
        "amqp://guest:guest@127.0.0.1:5672/",
        description="RabbitMQ, as an amqp:// or amqps:// URL; several, separated by commas, are tried in turn",
    )
    replicated_queues: bool = Field(
        False,
        description="declare the shared queues as quorum queues, which outlive the loss of a node of a RabbitMQ "
        "cluster; a round takes some milliseconds longer",
    )

    @property
    def topology(self) -> Topology:
        """The names at RabbitMQ."""
        return Topology(self.namespace, replicated=self.replicated_queues)


class JournalSettings(BrokerSettings):
    """Settings of processes whose messages the journal may record."""

    journal: bool = Field(
        False, description="record messages in a stream queue for `wisp replay`; they contain the users' tokens"
    )
    journal_bytes: int = Field(1_000_000_000, ge=10_000_000, description="largest size of the journal, in bytes")
    journal_hours: float = Field(24.0, gt=0, le=8784, description="age in hours at which the journal drops messages")

    @property
    def journal_limits(self) -> JournalLimits | None:
        """Size and age of the journal; None when it is off."""
        return JournalLimits(self.journal_bytes, max(1, int(self.journal_hours * 3600))) if self.journal else None


class RedisSettings(TlsSettings, NamespaceSettings):
    """Settings of processes that connect to Redis."""

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis, as a redis:// or rediss:// URL")


class ServiceSettings(ProcessSettings, RedisSettings, JournalSettings):
    """Settings of a service in the cluster: a process with RabbitMQ, the journal and Redis."""


class SessionTtlSettings(WispSettings):
    """Settings of the services that write sessions to Redis."""

    session_ttl_s: int = Field(
        SESSION_TTL_S, ge=10, description="seconds that a session's state stays in Redis after its last token"
    )


class SessionSecretSettings(WispSettings):
    """Settings of the services that make or check session keys."""

    session_secret: SecretStr | None = Field(
        None,
        description="secret shared by gateways, schedulers and verifiers, at least 32 characters: drafters must then "
        "show a key for each session; required where devices draft",
    )

    @property
    def session_keys(self) -> SessionKeys:
        """Makes and checks the keys of sessions."""
        return SessionKeys(None if self.session_secret is None else self.session_secret.get_secret_value())

    @model_validator(mode="after")
    def _secret_is_long(self) -> SessionSecretSettings:
        if self.session_secret is not None and len(self.session_secret.get_secret_value()) < SHORTEST_SECRET:
            raise ValueError(
                f"session_secret is shorter than {SHORTEST_SECRET} characters; make one with `openssl rand -hex 32`"
            )
        return self


class TargetSettings(WispSettings):
    """Settings of the services that use the target model or its tokenizer."""

    target: Path = Field(
        Path(".wisp/models/smollm2-135m-instruct"), description="folder of the target model (Hugging Face layout)"
    )
    dtype: Literal["auto", "bfloat16", "float32", "int8", "gguf"] = Field(
        "auto",
        description="format of the target's weights; auto keeps the blocks of a GGUF file (gguf) and is bfloat16 for "
        "others, int8 quantizes at the start",
    )


_DEVICES_FILE = TypeAdapter(list[Annotated[str, Field(pattern=NAME_PATTERN)]])


def read_devices(path: Path) -> list[str]:
    """Return the device names in a JSON list, each once, in the file's order. Raises SettingsError."""
    try:
        return list(dict.fromkeys(_DEVICES_FILE.validate_json(path.read_bytes())))
    except OSError as error:
        raise SettingsError(f"devices {path}: {error.strerror or error}") from error
    except ValidationError as error:
        problem = in_words(error.errors(include_url=False)[0])
        raise SettingsError(
            f'devices {path}: {problem}; expected a JSON list of names, such as ["kitchen", "car-7"]'
        ) from error


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{WispSettings.model_config['env_prefix']}{name.upper()}"


def variables(kind: type[WispSettings]) -> set[str]:
    """Return the environment variables of settings."""
    return {variable(name) for name in kind.model_fields}
