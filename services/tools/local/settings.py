"""Settings of commands and local stacks from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr

from shared.runtime.settings import NAME_PATTERN, TlsSettings, WispSettings

DEFAULT_TARGET = "smollm2-135m-instruct"


class BrokerAddresses(TlsSettings):
    """Addresses of given brokers. A missing address stands for a private broker."""

    amqp_url: str | None = None
    redis_url: str | None = None


class LocalSettings(WispSettings):
    """Defaults of a command's options."""

    target: str = DEFAULT_TARGET
    """A packaged model's name, or a model's folder."""
    namespace: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Prefix at the brokers; by default each run has its own."""
    api_keys_file: Path | None = None
    """File of the gateway's API keys."""
    unsafe_serve_everybody: bool = False
    """The gateway's setting of the same name."""
    generation_config: Literal["auto", "ignore"] = "auto"
    """The gateway's setting of the same name."""
    api_key: SecretStr = Field(
        default=SecretStr("none"), validation_alias=AliasChoices("WISP_API_KEY", "OPENAI_API_KEY")
    )
    """Key for requests. The OpenAI client needs one, and a gateway without keys accepts any."""
