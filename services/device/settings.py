"""Settings of a device."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, model_validator
from yarl import URL

from services.drafter.settings import DraftServingSettings
from services.gateway.settings import AllowedHostsSettings, is_loopback
from shared.errors import SettingsError
from shared.runtime.settings import NAME_PATTERN
from shared.runtime.tls import Tls


class DeviceSettings(DraftServingSettings, AllowedHostsSettings):
    """Settings of a device: the cluster's addresses, and the drafter."""

    device_name: str = Field(pattern=NAME_PATTERN, description="this device's name, as in the schedulers' devices_file")
    gateway_url: str = Field(description="URL of the cluster's API: https://, ending in /v1")
    api_key: SecretStr = Field(description="this device's API key (wisp keys new NAME --device NAME)")
    gateway_ca_file: Path | None = Field(
        None, description="authorities (PEM) that the gateway's certificate is checked against; default: the system's"
    )
    host: str = Field("127.0.0.1", description="address of the API on this device: a loopback one")
    port: int = Field(8000, ge=0, le=65535, description="port of the API on this device; 0 takes a free one")

    @model_validator(mode="after")
    def _is_safe(self) -> DeviceSettings:
        if not is_loopback(self.host):
            raise ValueError(
                f"host is {self.host!r}, but the API of a device requires no key and is for this device alone; stay on "
                "127.0.0.1"
            )
        try:
            gateway = URL(self.gateway_url)
        except ValueError as error:
            raise ValueError(f"gateway_url: {error}") from None
        if gateway.scheme not in ("http", "https") or not gateway.host or gateway.path.rstrip("/") != "/v1":
            raise ValueError(f"gateway_url {self.gateway_url!r}: expected the form https://host:port/v1")
        if gateway.scheme == "http" and not is_loopback(gateway.host):
            raise ValueError(
                f"gateway_url {self.gateway_url!r}: others could read the key on the network; use https://"
            )
        amqp = URL(self.amqp_url)
        if amqp.scheme == "amqp" and not is_loopback(amqp.host or ""):
            raise ValueError("amqp_url: others could read the password and all text on the network; use amqps://")
        try:
            Tls(self.gateway_ca_file).context()
        except SettingsError as error:
            raise ValueError(f"gateway's {error}") from None
        return self
