"""The device's process: its API on loopback, and a drafter that serves what is asked there."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import httpx
import uvicorn

from services.device.relay import Relay
from services.device.settings import DeviceSettings
from services.drafter.drafting import load_drafting
from services.drafter.link import load_profile
from services.drafter.service import Drafter
from services.gateway.server import Protocol, Server, listen
from shared.broker.client import Broker
from shared.broker.topology import Topology, device_name
from shared.runtime import logging
from shared.runtime.service import running
from shared.runtime.tls import Tls

TIMEOUT = httpx.Timeout(120.0, connect=10.0)
"""Of the gateway: it gives up silent sessions itself, and sooner."""
CLOSING_S = 5


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
        drafter = Drafter(name, name, settings, drafting, broker, None, profile)
        server = Server(
            uvicorn.Config(
                Relay(gateway),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSING_S,
            )
        )
        host, port = listener.getsockname()[:2]
        logging.get().info("serving", url=f"http://{f'[{host}]' if ':' in host else host}:{port}/v1", device=name)
        closed = asyncio.Event()

        async def serving() -> None:
            try:
                await server.serve(sockets=[listener])
            finally:
                closed.set()

        async with running(stop, drafter.run(asyncio.Event()), serving()):
            server.should_exit = True
            await closed.wait()
