"""`python -m services.device`, or `wisp device`."""

from services.device.service import serve
from services.device.settings import DeviceSettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("device", DeviceSettings, serve)
