"""The gateway's process: connections to the brokers, and what of them is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from prometheus_client import REGISTRY, CollectorRegistry

from services.gateway.app import Gateway
from services.gateway.core.admission import Admission
from services.gateway.core.completion import sessions_of
from services.gateway.errors import ApiError
from services.gateway.fleet import Fleet
from services.gateway.keys import KeyFile
from services.gateway.ledger import Ledger
from services.gateway.metrics import Metrics
from services.gateway.server import listen, serve_api
from services.gateway.sessions import Backend
from services.gateway.settings import GatewaySettings
from shared.broker.client import Broker
from shared.broker.topology import LOAD, Queue, Topology, result
from shared.errors import BrokersError
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.state.store import Store

READY_TIMEOUT_S = 2.0
ATTEND_S = 1.0
"""Time between two signs of life of this gateway in Redis."""
REAP_S = 5.0
"""Time between two looks at sessions that nobody collects."""


async def serve(
    settings: GatewaySettings, instance: str, stop: asyncio.Event, registry: CollectorRegistry = REGISTRY
) -> None:
    """Serve the HTTP API until `stop` is set, then end in order."""
    folder = ModelFolder(settings.target)
    tokenizer = Tokenizer(folder)
    fingerprint = folder.fingerprint(settings.dtype)
    keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    listener = listen(settings.host, settings.port)
    topology = Topology(settings.namespace)
    broker = await Broker.connect(settings.amqp_url, topology, instance, settings.journal_limits, settings.tls)
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    fleet = Fleet(store.heartbeats, fingerprint)
    model = settings.model_name or folder.name
    metrics = Metrics(model, registry)
    ledger = Ledger(store.quota, settings.key_limits, metrics)

    queue = topology.own_queue("gateway", instance, (result(instance), LOAD))
    backend = Backend(
        broker,
        store,
        sessions_of(tokenizer),
        metrics,
        Admission(settings.slo_classes, settings.max_sessions, settings.max_backlog_ms, settings.admission),
        instance=instance,
        fingerprint=fingerprint,
        vocab_fingerprint=folder.vocab_fingerprint,
        idle_check_s=settings.idle_check_s,
        stall_timeout_s=settings.stall_timeout_s,
        resume_s=settings.resume_s,
        queue=queue,
        session_keys=settings.session_keys,
    )
    await broker.consume(queue, backend.receive)
    HEALTH.watch(broker, store)

    async def missing() -> dict[str, str | None]:
        return await _missing(broker, queue, store, fleet, backend)

    gateway = Gateway(
        settings,
        model,
        folder,
        tokenizer,
        fingerprint,
        backend,
        fleet.longest_session,
        missing,
        metrics,
        ledger,
        keys,
    )

    async def attend() -> None:
        while True:
            try:
                await store.attend(instance)
            except BrokersError as error:
                logging.get().warning("Redis does not know that this gateway is there", error=str(error))
            await asyncio.sleep(ATTEND_S)

    async def reap() -> None:
        while True:
            await asyncio.sleep(REAP_S)
            with suppress(BrokersError):  # the next look will do
                if reaped := await store.reap():
                    logging.get().info("sessions that nobody collects ended", sessions=reaped)

    try:
        await serve_api(gateway, listener, stop, ledger.renew(), attend(), reap())
    finally:
        await broker.close()
        await store.close()


async def _missing(broker: Broker, queue: Queue, store: Store, fleet: Fleet, backend: Backend) -> dict[str, str | None]:
    """What keeps this gateway from serving a request, by part."""

    async def problem(check: Awaitable[object]) -> str | None:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await check
        except (BrokersError, ApiError) as error:
            return str(error)
        except TimeoutError:
            return f"no answer in {READY_TIMEOUT_S:g} s"
        return None

    rabbitmq, redis, verifier = await asyncio.gather(
        problem(broker.prove(queue, READY_TIMEOUT_S)), problem(store.ping()), problem(fleet.longest_session())
    )
    return {
        "rabbitmq": rabbitmq,
        "redis": redis,
        "verifier": verifier,
        "gateway": "shutting down" if backend.draining else None,
    }
