"""What the command takes from the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.runtime.settings import NAME_PATTERN, TlsSettings

DEFAULT_TARGET = "smollm2-135m-instruct"


class BrokerAddresses(TlsSettings):
    """Brokers that somebody else runs. An address that is absent stands for a private instance."""

    model_config = SettingsConfigDict(env_prefix="WISP_", extra="ignore", frozen=True)

    amqp_url: str | None = None
    redis_url: str | None = None


class LocalSettings(BaseSettings):
    """What a stack on this machine is made of, as far as the environment says; options of a command go before it."""

    model_config = SettingsConfigDict(env_prefix="WISP_", extra="ignore", frozen=True)

    target: str = DEFAULT_TARGET
    """A packaged model's name, or the folder of a model."""
    namespace: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Prefix at the brokers; by default each run takes one of its own."""
    api_keys_file: Path | None = None
    """The API keys that a gateway takes."""
    unsafe_serve_everybody: bool = False
    """As the gateway's setting of that name."""
    api_key: SecretStr = Field(
        default=SecretStr("none"), validation_alias=AliasChoices("WISP_API_KEY", "OPENAI_API_KEY")
    )
    """What is shown to a gateway. One that asks for no keys takes anything, and the OpenAI client insists on one."""
