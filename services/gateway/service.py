"""The gateway's process: RabbitMQ, Redis and the HTTP API, put together."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from services.gateway.app import serve_api
from services.gateway.core.admission import Admission
from services.gateway.fleet import PROBE_TIMEOUT_S, Fleet
from services.gateway.gateway import Gateway
from services.gateway.keys import KeyFile
from services.gateway.ledger import Ledger
from services.gateway.model import ServedModel
from services.gateway.page.feed import BrokerMessages, FleetFeed
from services.gateway.server import listen
from services.gateway.settings import GatewaySettings
from services.gateway.transport import BrokerTransport
from shared.broker.client import Broker
from shared.broker.topology import LOAD, result
from shared.errors import BrokersError
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.state.store import Store

ATTEND_S = 1.0
"""Time between two signs of life of this gateway in Redis."""
REAP_S = 5.0
"""Time between two searches for sessions that no gateway collects."""


async def serve(settings: GatewaySettings, instance: str, stop: asyncio.Event) -> None:
    """Serve the HTTP API until `stop` is set, then end in order."""
    # Not in the event loop, which answers /live: of a model on a volume, it reads all weights.
    model = await asyncio.to_thread(ServedModel.load, settings, settings.model_name)
    keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    listener = listen(settings.host, settings.port)
    topology = settings.topology
    broker = await Broker.connect(settings.amqp_url, topology, instance, settings.journal_limits, settings.tls)
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    queue = topology.own_queue("gateway", instance, (result(instance), LOAD))
    patience_ms = int(settings.resume_s * 1000)
    transport = BrokerTransport(
        broker,
        store,
        instance,
        queue,
        patience_ms=patience_ms,
        outage_wait_s=settings.outage_wait_s,
        session_keys=settings.session_keys,
    )

    async def rabbitmq() -> None:
        await broker.liveness.prove(queue, PROBE_TIMEOUT_S)
        await broker.liveness.check_queue(topology.verify_queue(), PROBE_TIMEOUT_S)

    probes = {"rabbitmq": rabbitmq, "redis": store.ping}
    fleet = Fleet(store.registry.heartbeats, model.fingerprint, probes, wait_s=settings.outage_wait_s)
    gateway = Gateway.assemble(
        settings,
        instance,
        model,
        transport,
        fleet,
        ledger=Ledger(store.quota, settings.key_limits),
        keys=keys,
        feed=FleetFeed(BrokerMessages(settings.amqp_url, topology, instance, settings.tls)),
        admission=Admission(
            settings.slo_classes, settings.max_sessions, settings.max_backlog_ms, predict=settings.admission
        ),
        idle_check_s=settings.idle_check_s,
        arithmetics=lambda: fleet.arithmetics,
    )
    try:
        await store.refuse_cluster()
        await broker.consume(queue, gateway.sessions.receive)
        HEALTH.watch(broker, store)
        loops = (gateway.ledger.renew(), _attend(store, instance), _reap(store), fleet.follow())
        await serve_api(gateway, listener, stop, *loops)
    finally:
        await broker.close()
        await store.close()


async def _attend(store: Store, instance: str) -> None:
    """Renew this gateway's sign of life, for ever."""
    while True:
        try:
            await store.registry.attend(instance)
        except BrokersError as error:
            logging.get().warning("this gateway's sign of life was not renewed", error=str(error))
        await asyncio.sleep(ATTEND_S)


async def _reap(store: Store) -> None:
    """End the sessions that no gateway collects, for ever."""
    while True:
        await asyncio.sleep(REAP_S)
        with suppress(BrokersError):  # the next search finds them
            if reaped := await store.reap():
                logging.get().info(
                    "sessions ended whose clients left and did not resume, or whose gateway died", sessions=reaped
                )
