"""The gateway's process: connections, HTTP server, orderly end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable

import uvicorn
from prometheus_client import REGISTRY, CollectorRegistry

from services.gateway.admission import Admission
from services.gateway.app import Gateway, create_app
from services.gateway.backend import Backend
from services.gateway.errors import ApiError
from services.gateway.fleet import Fleet
from services.gateway.guard import KeyFile
from services.gateway.https import Certificate
from services.gateway.ledger import Ledger
from services.gateway.metrics import Metrics
from services.gateway.plan import Plan
from services.gateway.server import Protocol, Server
from services.gateway.session import Session
from services.gateway.settings import GatewaySettings
from shared import logging
from shared.broker import Broker
from shared.errors import BrokersError, SettingsError
from shared.models.folder import ModelFolder
from shared.models.stop import StopStrings
from shared.models.text import Detokenizer, Tokenizer
from shared.service import running
from shared.store import Store
from shared.topology import LOAD, Queue, Topology, result

READY_TIMEOUT_S = 2.0
CLOSING_S = 5
"""Time for connections to be closed after the last session has ended."""


async def serve(
    settings: GatewaySettings, instance: str, stop: asyncio.Event, registry: CollectorRegistry = REGISTRY
) -> None:
    """Serve the HTTP API until `stop` is set, then end in order."""
    log = logging.get()
    folder = ModelFolder(settings.target)
    tokenizer = Tokenizer(folder)
    fingerprint = folder.fingerprint(settings.dtype)
    keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    certificate = None
    if settings.https_cert_file is not None:
        certificate = Certificate(settings.https_cert_file, settings.https_key_file)
    listener = listen(settings.host, settings.port)
    topology = Topology(settings.namespace)
    broker = await Broker.connect(settings.amqp_url, topology, instance, settings.tls)
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    fleet = Fleet(store.heartbeats, fingerprint)
    model = settings.model_name or folder.name
    metrics = Metrics(model, registry)
    ledger = Ledger(store.quota, settings.key_limits, metrics)

    def new_session(plan: Plan) -> Session:
        return Session(
            prompt_len=len(plan.prompt),
            stop_ids=frozenset(plan.stop_ids),
            detokenizer=Detokenizer(tokenizer),
            stops=StopStrings(plan.stops),
            echo=plan.echo,
        )

    backend = Backend(
        broker,
        store,
        new_session,
        metrics,
        Admission(settings.slo_classes, settings.max_sessions, settings.max_backlog_ms, settings.admission),
        instance=instance,
        fingerprint=fingerprint,
        vocab_fingerprint=folder.vocab_fingerprint,
        idle_check_s=settings.idle_check_s,
        stall_timeout_s=settings.stall_timeout_s,
        seal=settings.seal,
    )
    queue = topology.own_queue("gateway", instance, (result(instance), LOAD))
    await broker.consume(queue, backend.receive)

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
    server = Server(
        uvicorn.Config(
            create_app(gateway),
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.drain_s) + CLOSING_S,
            ssl_context_factory=certificate.factory if certificate else None,
        )
    )
    host, port = listener.getsockname()[:2]
    scheme = "https" if certificate else "http"
    log.info("serving", url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1", model=model)
    watches = [backend.watch(), ledger.renew()]
    watches += [keys.watch()] if keys else []
    watches += [certificate.watch()] if certificate else []
    closed = asyncio.Event()

    async def serving() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            closed.set()

    try:
        async with running(stop, *watches, serving()):
            log.info("draining", sessions=backend.running)
            server.should_exit = True
            await backend.drain(settings.drain_s)
            await closed.wait()
            await ledger.settled()
    finally:
        await broker.close()
        await store.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises SettingsError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error}); choose another WISP_HOST or WISP_PORT"
        ) from error


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
