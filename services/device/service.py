"""The device's process: its API on loopback, and a drafter for the requests to it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import httpx

from services.device.relay import device_api
from services.device.settings import DeviceSettings
from services.drafter.drafting import load_drafting
from services.drafter.link import load_profile
from services.drafter.service import Drafter, described
from services.gateway.server import listen, serve_http
from shared.broker.client import Broker
from shared.broker.topology import Topology, device_name
from shared.runtime.tls import Tls

TIMEOUT = httpx.Timeout(120.0, connect=10.0)
"""Timeouts of requests to the gateway, in seconds. The gateway gives up silent sessions sooner."""


async def serve(settings: DeviceSettings, _instance: str, stop: asyncio.Event) -> None:
    """Serve the device's API and draft for it until `stop` is set."""
    name = device_name(settings.device_name)
    profile = load_profile(settings.device_profile)
    drafting = await asyncio.to_thread(load_drafting, settings)
    listener = listen(settings.host, settings.port)
    topology = Topology(settings.namespace, settings.device_name)
    async with AsyncExitStack() as resources:
        broker = await Broker.connect(settings.amqp_url, topology, name, tls=settings.tls)
        resources.push_async_callback(broker.close)
        gateway = await resources.enter_async_context(
            httpx.AsyncClient(
                base_url=settings.gateway_url.rstrip("/").removesuffix("/v1"),
                headers={"authorization": f"Bearer {settings.api_key.get_secret_value()}"},
                verify=Tls(settings.gateway_ca_file).context(),
                timeout=TIMEOUT,
                limits=httpx.Limits(max_connections=None),
                trust_env=False,
            )
        )
        drafter = Drafter(name, name, settings.options, drafting, broker, None, profile)
        drafting_work = drafter.run(asyncio.Event(), described(settings))
        await serve_http(device_api(gateway, settings.allowed_host_names), listener, stop, drafting_work, device=name)
