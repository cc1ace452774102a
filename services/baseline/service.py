"""The baselines: `centralized` and `colocated` serving, against which the suite is measured.

The API is the gateway's own code: chat template, tokenizer, limits, streaming, traces, SLOs. The computation is the
suite's engine and the verifier's code for a step. Only the parts between them are missing: RabbitMQ, Redis, scheduler,
drafter, estimator, and the messages of each round.

The API and the engine are two processes on one machine, joined by a local socket, as in modern engines (vLLM's API
server and engine core). In one process they would compete for Python's interpreter lock: tokenizing a request or
sending a token would delay the engine's steps, and the many small calls of a step would delay the streams. The baseline
would be slower than necessary, which would flatter the suite. The results of a step cross the socket together.
"""

from __future__ import annotations

import asyncio

from services.baseline.client import started
from services.baseline.settings import BaselineSettings
from services.gateway.app import serve_api
from services.gateway.gateway import Gateway
from services.gateway.model import ServedModel
from services.gateway.server import listen
from shared.runtime import logging
from shared.runtime.health import HEALTH


async def serve(settings: BaselineSettings, instance: str, stop: asyncio.Event) -> None:
    """Serve the HTTP API until `stop` is set, then end in order."""
    model = await asyncio.to_thread(ServedModel.load, settings, settings.model_name)
    listener = listen(settings.host, settings.port)
    async with started(settings, instance) as engine:
        logging.get().info("engine ready", serving=settings.serving)
        gateway = Gateway.assemble(settings, instance, model, engine, engine)
        HEALTH.watch(None, None, engine=engine.prove)
        await serve_api(gateway, listener, stop, engine.deliver(gateway))
