"""A device's settings: values that would expose its key, its text or its API to others are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.device.settings import DeviceSettings
from services.scheduler.settings import SchedulerSettings
from shared.runtime.settings_loading import problems_of

GOOD = {
    "device_name": "ann",
    "gateway_url": "https://wisp.example/v1",
    "api_key": "hidden",
    "amqp_url": "amqps://u:hidden@wisp.example/",
}


def test_a_device_with_tls_is_accepted() -> None:
    settings = DeviceSettings.model_validate(GOOD)
    assert settings.host == "127.0.0.1"
    near = {"gateway_url": "http://127.0.0.1:8000/v1", "amqp_url": "amqp://u:hidden@localhost/"}
    assert DeviceSettings.model_validate(GOOD | near).gateway_url.startswith("http:")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"host": "0.0.0.0"}, "is for this device alone"),
        ({"gateway_url": "http://wisp.example/v1"}, "use https://"),
        ({"gateway_url": "https://wisp.example"}, "https://host:port/v1"),
        ({"gateway_url": "wisp"}, "https://host:port/v1"),
        ({"amqp_url": "amqp://u:hidden@wisp.example/"}, "use amqps://"),
        ({"gateway_ca_file": "/nowhere.pem"}, "/nowhere.pem"),
        ({"device_name": "a.b"}, "WISP_DEVICE_NAME"),
        ({"device_name": None}, "WISP_DEVICE_NAME"),
    ],
)
def test_a_device_that_would_expose_itself_does_not_start(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DeviceSettings.model_validate(GOOD | changed)
    text = "\n".join(problems_of(refused.value))
    assert said in text
    assert "hidden" not in text


def test_a_scheduler_accepts_no_devices_without_session_keys() -> None:
    with pytest.raises(ValidationError, match="WISP_SESSION_SECRET"):
        SchedulerSettings.model_validate({"devices_file": "devices.json"})
