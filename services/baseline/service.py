"""The baselines that the suite is measured against: `centralized` and `colocated` serving.

What a client sees is the gateway's own code: API, chat template, tokenizer, limits, streaming, traces, promises. What
computes is the suite's own engine, and the verifier's own code for a step. Only what lies between is left out: no
RabbitMQ, no Redis, no scheduler, drafter or estimator, no message to another machine for each round.

The API and the engine are two processes on one machine, joined by a local socket, as modern engines have it (vLLM's API
server and engine core). In one process they would take turns at Python's interpreter lock: each request's tokenizing
and each token's event would hold up the engine's steps, and a step's thousands of small calls the streams. That would
make the baseline slower than it has to be, and what is compared with it faster. A step's results cross the socket
together.
"""

from __future__ import annotations

import asyncio

from prometheus_client import REGISTRY, CollectorRegistry

from services.baseline.client import started
from services.baseline.settings import BaselineSettings
from services.gateway.app import Gateway
from services.gateway.core.admission import Admission
from services.gateway.core.completion import sessions_of
from services.gateway.ledger import Ledger
from services.gateway.metrics import Metrics
from services.gateway.server import listen, serve_api
from services.gateway.sessions import Backend
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.runtime import logging
from shared.runtime.health import HEALTH


async def serve(
    settings: BaselineSettings, instance: str, stop: asyncio.Event, registry: CollectorRegistry = REGISTRY
) -> None:
    """Serve the HTTP API until `stop` is set, then end in order."""
    folder = ModelFolder(settings.target)
    tokenizer = Tokenizer(folder)
    fingerprint = folder.fingerprint(settings.dtype)
    model = settings.model_name or folder.name
    metrics = Metrics(model, registry)
    ledger = Ledger(None, settings.key_limits, metrics)
    listener = listen(settings.host, settings.port)
    async with started(settings, instance) as engine:
        logging.get().info("engine ready", serving=settings.serving)
        backend = Backend(
            engine,
            engine,
            sessions_of(tokenizer),
            metrics,
            Admission(settings.slo_classes, settings.max_sessions, settings.max_backlog_ms, settings.admission),
            instance=instance,
            fingerprint=fingerprint,
            vocab_fingerprint=folder.vocab_fingerprint,
            idle_check_s=settings.idle_check_s,
            stall_timeout_s=settings.stall_timeout_s,
            resume_s=settings.resume_s,
            stall_reason="the engine is overloaded",
        )

        async def missing() -> dict[str, str | None]:
            return {**await engine.missing(), "gateway": "shutting down" if backend.draining else None}

        gateway = Gateway(
            settings, model, folder, tokenizer, fingerprint, backend, engine.longest_session, missing, metrics, ledger
        )
        HEALTH.watch(None, None, engine=engine.prove)
        await serve_api(gateway, listener, stop, engine.deliver(backend))
