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

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from shared.topology import JournalLimits

NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
HOST_LENGTH = 46
"""Of a host's name in a process's: a pod's name fits, and what is made of it is no longer than 64."""


class ServiceSettings(BaseSettings):
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
        problems = []
        for item in error.errors():
            name = "_".join(str(part) for part in item["loc"])
            given = "" if item["type"] == "missing" else f" (given: {item['input']!r})"
            if name:
                problems.append(f"  WISP_{name.upper()} or --{name.replace('_', '-')}: {item['msg']}{given}")
            else:  # settings that do not go together
                problems.append(f"  {item['msg'].removeprefix('Value error, ')}")
        _refuse(program, problems)
    except SettingsError as error:
        _refuse(program, [f"  {error}"])


def _refuse(program: str, problems: list[str]) -> NoReturn:
    print(f"{program}: bad settings\n" + "\n".join(problems) + f"\nSee `{program} --help`.", file=sys.stderr)
    raise SystemExit(2)
