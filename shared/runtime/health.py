"""Whether this process does its work: `/live`, `/ready` and `/metrics` on the metrics port, and the command that asks.

`/ready` says yes when every consumer answers and Redis does; `/live` says no only where starting this process again
would help: its event loop hangs, or a consumer is dead although RabbitMQ is there and takes messages. An outage of
RabbitMQ or Redis, or an alarm there, must not restart every process, which would throw away the K/V caches.

`python -m shared.runtime.health` asks the process that runs with the same settings, and ends with status 1 unless it is
ready.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from shared.broker.client import Broker
from shared.errors import SettingsError, WispError
from shared.runtime.settings import ProcessSettings, load
from shared.state.store import Store

CHECK_S = 3.0
"""Longest time that a part of the process may take to answer."""
ASK_S = 2 * CHECK_S + 2.0

Check = Callable[[], Awaitable[None]]


class Health:
    """What this process has to prove. Not ready before `watch` is called."""

    def __init__(self) -> None:
        self._broker: Broker | None = None
        self._store: Store | None = None
        self._parts: dict[str, Check] = {}
        self.stopping = False

    def watch(self, broker: Broker | None, store: Store | None, **parts: Check) -> None:
        """From now on ready means that these answer; some processes have only one. Call it when all is consumed.

        `parts` are others that have to answer, by the names under which they are told; they raise WispError.
        """
        self._broker, self._store, self._parts = broker, store, parts

    async def ready(self) -> dict[str, str]:
        """What keeps the process from its work, by part; empty when nothing does."""
        if self.stopping:
            return {"process": "shutting down"}
        if self._broker is None and self._store is None and not self._parts:
            return {"process": "starting"}
        checks: dict[str, Awaitable[None]] = {name: check() for name, check in self._parts.items()}
        if self._broker is not None:
            checks["rabbitmq"] = self._broker.prove_consumers(CHECK_S)
        if self._store is not None:
            checks["redis"] = self._store.ping()
        found = await asyncio.gather(*(_problem(check) for check in checks.values()))
        return {part: problem for part, problem in zip(checks, found, strict=True) if problem}

    async def live(self) -> dict[str, str]:
        """What starting the process again would mend."""
        broker = self._broker
        if broker is None or self.stopping or not broker.connected:
            return {}
        problem = await _problem(broker.prove_consumers(CHECK_S))
        # The connection may have gone meanwhile, or RabbitMQ have stopped reading from it.
        return {"rabbitmq": problem} if problem and await broker.takes_messages() else {}


HEALTH = Health()
"""That of this process."""


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
        """Probes come every few seconds and are not worth a line."""


def serve(health: Health, host: str, port: int, loop: asyncio.AbstractEventLoop) -> int:
    """Answer on `host`:`port` (0 takes a free one) from threads, asking `loop`; returns the port.

    Raises SettingsError when the port cannot be had.
    """

    def asked(check: Callable[[], Any]) -> tuple[HTTPStatus, bytes]:
        future = asyncio.run_coroutine_threadsafe(check(), loop)
        try:
            problems = future.result(ASK_S)
        except TimeoutError:
            future.cancel()
            problems = {"process": f"its event loop does not answer in {ASK_S:g} s"}
        text = "".join(f"{part}: {problem}\n" for part, problem in problems.items()) or "ok\n"
        return HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK, text.encode()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind = "text/plain; charset=utf-8"
        match environ["PATH_INFO"]:
            case "/metrics":
                status, body, kind = HTTPStatus.OK, generate_latest(), CONTENT_TYPE_LATEST
            case "/live":
                status, body = asked(health.live)
            case "/ready":
                status, body = asked(health.ready)
            case _:
                status, body = HTTPStatus.NOT_FOUND, b"there are /live, /ready and /metrics\n"
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
    """Whether the process that serves this port is ready, and what it says."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=ASK_S + 1) as answer:
            return True, answer.read().decode()
    except urllib.error.HTTPError as error:
        return False, error.read().decode(errors="replace")
    except OSError as error:
        return False, f"nothing answers on port {port}: {error}\n"


def main() -> None:
    """Ask, print the answer, end with status 0 or 1."""
    settings = load(ProcessSettings, "python -m shared.runtime.health")
    if not settings.metrics_port:
        print("WISP_METRICS_PORT is 0: the service answers no questions of health. Set a port.", file=sys.stderr)
        raise SystemExit(2)
    is_ready, text = ask(settings.metrics_port)
    print(text, end="", file=sys.stdout if is_ready else sys.stderr)
    raise SystemExit(0 if is_ready else 1)


if __name__ == "__main__":
    main()
