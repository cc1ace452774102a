"""What the command takes from the environment."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.settings import NAME_PATTERN

DEFAULT_TARGET = "smollm2-135m-instruct"


class BrokerAddresses(BaseSettings):
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
