"""Health of this process: `/live`, `/ready` and `/metrics` on the metrics port, and the command that asks them.

`/ready` succeeds when every consumer and Redis answer. `/live` fails only when a restart of the process would help: its
event loop hangs, or a consumer is dead although RabbitMQ is reachable and accepts messages. An outage or an alarm of
RabbitMQ or Redis must not restart every process, because that would discard the KV caches.

`python -m shared.runtime.health` asks the process with the same settings, and exits with 1 unless it is ready.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from shared.broker.client import Broker
from shared.errors import QueueDown, SettingsError, WispError
from shared.runtime.settings import ProcessSettings
from shared.runtime.settings_loading import load
from shared.state.registry import Registry
from shared.state.store import Store

CHECK_S = 3.0
"""Longest answer time of a part of the process."""
ASK_S = 2 * CHECK_S + 2.0

Check = Callable[[], Awaitable[None]]


class Health:
    """Checks of this process. Not ready before `watch` is called."""

    def __init__(self) -> None:
        self._broker: Broker | None = None
        self._redis: Store | Registry | None = None
        self._parts: dict[str, Check] = {}
        self.stopping = False
        self.notes: Callable[[], dict[str, str]] = dict
        """Returns what `/ready` reports beside problems, by part."""

    def watch(self, broker: Broker | None, redis: Store | Registry | None, **parts: Check) -> None:
        """Require answers of these from now on. Call it when all queues are consumed.

        `parts` are further checks by the names under which they are reported; a check that fails raises WispError.
        """
        self._broker, self._redis, self._parts = broker, redis, parts

    async def ready(self) -> dict[str, str]:
        """Return the problems that keep the process from its work, by part."""
        if self.stopping:
            return {"process": "shutting down"}
        if self._broker is None and self._redis is None and not self._parts:
            return {"process": "starting"}
        checks: dict[str, Awaitable[None]] = {name: check() for name, check in self._parts.items()}
        if self._broker is not None:
            checks["rabbitmq"] = self._broker.liveness.prove_consumers(CHECK_S)
        if self._redis is not None:
            checks["redis"] = self._redis.ping()
        found = await asyncio.gather(*(_problem(check) for check in checks.values()))
        return {part: problem for part, problem in zip(checks, found, strict=True) if problem}

    async def live(self) -> dict[str, str]:
        """Return the problems that a restart of the process would solve, by part."""
        broker = self._broker
        if broker is None or self.stopping or not broker.connected:
            return {}
        problem = await _problem(_prove_own_part(broker))
        # Not if the connection was lost meanwhile, or RabbitMQ has stopped reading from it.
        return {"rabbitmq": problem} if problem and await broker.liveness.takes_messages() else {}


HEALTH = Health()
"""The health of this process."""


async def _prove_own_part(broker: Broker) -> None:
    """Check the consumers. A queue whose RabbitMQ node is down passes: no restart of this process would help."""
    with suppress(QueueDown):
        await broker.liveness.prove_consumers(CHECK_S)


async def _problem(check: Awaitable[None]) -> str | None:
    try:
        async with asyncio.timeout(2 * CHECK_S):
            await check
    except WispError as error:
        return str(error)
    except TimeoutError:
        return f"no answer in {2 * CHECK_S:g} s"
    return None


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: probes arrive every few seconds."""


def serve(health: Health, host: str, port: int, loop: asyncio.AbstractEventLoop) -> int:
    """Serve on `host`:`port` (0 takes a free port) in threads that run the checks in `loop`; return the port.

    Raises SettingsError when the port is not available.
    """

    def run_check(check: Callable[[], Any], notes: Callable[[], dict[str, str]] = dict) -> tuple[HTTPStatus, bytes]:
        future = asyncio.run_coroutine_threadsafe(check(), loop)
        try:
            problems = future.result(ASK_S)
        except TimeoutError:
            future.cancel()
            problems = {"process": f"its event loop does not answer in {ASK_S:g} s"}
        reported = problems or {"ok": "", **notes()}
        text = "".join(f"{part}: {problem}\n" if problem else f"{part}\n" for part, problem in reported.items())
        return HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK, text.encode()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind = "text/plain; charset=utf-8"
        match environ["PATH_INFO"]:
            case "/metrics":
                status, body, kind = HTTPStatus.OK, generate_latest(), CONTENT_TYPE_LATEST
            case "/live":
                status, body = run_check(health.live)
            case "/ready":
                status, body = run_check(health.ready, health.notes)
            case _:
                status, body = HTTPStatus.NOT_FOUND, b"not found; try /live, /ready or /metrics\n"
        start_response(f"{status.value} {status.phrase}", [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    try:
        server = make_server(host, port, application, _Server, _Quiet)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error}); choose another WISP_METRICS_HOST or WISP_METRICS_PORT"
        ) from error
    Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server.server_port


def ask(port: int) -> tuple[bool, str]:
    """Return whether the process that serves this port is ready, and its answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=ASK_S + 1) as answer:
            return True, answer.read().decode()
    except urllib.error.HTTPError as error:
        return False, error.read().decode(errors="replace")
    except OSError as error:
        return False, f"nothing answers on port {port}: {error}\n"


def main() -> None:
    """Ask for readiness, print the answer, and exit with 0 or 1."""
    settings = load(ProcessSettings, "python -m shared.runtime.health")
    if not settings.metrics_port:
        print("WISP_METRICS_PORT is 0, so the service answers no health checks; set a port", file=sys.stderr)
        raise SystemExit(2)
    is_ready, text = ask(settings.metrics_port)
    print(text, end="", file=sys.stdout if is_ready else sys.stderr)
    raise SystemExit(0 if is_ready else 1)


if __name__ == "__main__":
    main()
