"""Injection: sends recorded requests to a suite in another virtual host, in place of that suite's gateway."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from secrets import token_hex
from urllib.parse import quote, urlsplit, urlunsplit

from services.tools.replayer.core.injection import (
    InjectableRequest,
    InjectedRequest,
    InjectionReport,
    injectable_requests,
    injection_report,
)
from services.tools.replayer.core.performance import ServedRequest
from services.tools.replayer.core.recording import Recording, RecordingError, RecordingSource
from services.tools.replayer.journal import connected, source_of, vhost_of
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.connection import addresses
from shared.broker.topology import Topology
from shared.errors import BrokersError, Unroutable
from shared.messages import Cancel, Message, Result
from shared.runtime.settings import TlsSettings
from shared.state.sessions import Request
from shared.state.store import Store

PATIENCE_S = 60.0
"""Without a result for this long after the last request, the remaining sessions count as unfinished."""
TTL_S = 900
"""Lifetime of the sessions in Redis."""


def in_vhost(amqp_url: str, vhost: str) -> str:
    """Return the broker's URLs with another virtual host. Raises RecordingError if it is the URL's own."""
    parts = [urlsplit(url) for url in addresses(amqp_url)]
    own = vhost_of(amqp_url)
    if vhost == own:
        raise RecordingError(
            f"the configured address of {parts[0].hostname} has virtual host {vhost!r}, so it is the live one; inject "
            "into another (--vhost), in which a suite of its own runs"
        )
    return ",".join(urlunsplit(part._replace(path="/" + quote(vhost, safe=""))) for part in parts)


def refuse_live(recorded: RecordingSource, target: RecordingSource) -> None:
    """Raise RecordingError if the target is where the recording was made."""
    if recorded.vhost != target.vhost:
        return
    known = {recorded.cluster, recorded.address} - {""}
    if not known or known & {target.cluster, target.address}:
        raise RecordingError(
            f"the recording was made in virtual host {target.vhost!r} of {target.address}, so that is the live one; "
            "inject into another (--vhost), in which a suite of its own runs"
        )


async def inject(amqp_url: str, redis_url: str, namespace: str, recording: Recording, speed: float) -> InjectionReport:
    """Send the recorded requests, `speed` times as fast as recorded, and wait until they end.

    amqp_url: with the other virtual host. namespace, redis_url: of the suite that runs there. Raises RecordingError if
    the recording has no request or the virtual host is the live one, BrokersError if no drafter is running.
    """
    recording.refuse_redacted("inject")
    requests = injectable_requests(recording)
    if not requests:
        raise RecordingError("no request's beginning is in the recording: nothing to inject")
    async with connected(amqp_url) as connection:
        refuse_live(recording.source, source_of(connection, amqp_url, namespace))
    name = f"inject-{token_hex(3)}"
    tls = TlsSettings().tls
    broker = await Broker.connect(amqp_url, Topology(namespace), name, tls=tls)
    store = Store.connect(redis_url, namespace, TTL_S, tls)
    try:
        return await _Injection(name, broker, store, requests, speed).run()
    finally:
        await broker.close()
        await store.close()


class _Injection:
    """One injection, which is the gateway of its sessions. Their ids are its own."""

    def __init__(
        self, name: str, broker: Broker, store: Store, requests: list[InjectableRequest], speed: float
    ) -> None:
        self._name = name
        self._broker = broker
        self._store = store
        self._requests = requests
        self._speed = speed
        self._injected: dict[str, InjectedRequest] = {}
        self._received = asyncio.Event()
        self._late_ms = 0.0
        self._start_s = 0.0

    async def run(self) -> InjectionReport:
        await self._store.ping()
        queue = self._broker.topology.own_queue("inject", self._name, (topology.result(self._name),))
        await self._broker.consume(queue, self._receive)
        self._start_s = time.monotonic()
        steps: list[tuple[float, InjectableRequest, bool]] = [(one.at_ms, one, False) for one in self._requests]
        steps += [(one.cancel_ms, one, True) for one in self._requests if one.cancel_ms is not None]
        begin_ms = self._requests[0].at_ms
        try:
            for at_ms, request, cancel in sorted(steps, key=lambda step: (step[0], step[2])):
                await self._sleep_until(max(0.0, at_ms - begin_ms) / self._speed / 1000)
                if cancel:
                    await self._cancel(self._session_id(request), "cancelled in the recording")
                else:
                    await self._send(request)
            await self._wait_for_ends()
        finally:
            # An interrupted injection leaves no running sessions behind.
            for injected in self._injected.values():
                if injected.ended is None:
                    with suppress(BrokersError):
                        await self._cancel(injected.session_id, "injection over", end=False)
        return injection_report(list(self._injected.values()), self._late_ms)

    def _session_id(self, request: InjectableRequest) -> str:
        """Return the new session's id, which ends in the recorded one."""
        return f"{self._name}-{request.generate.session[-100:]}"

    async def _sleep_until(self, due_s: float) -> None:
        wait_s = due_s - (time.monotonic() - self._start_s)
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        else:
            self._late_ms = max(self._late_ms, -wait_s * 1000)

    async def _send(self, request: InjectableRequest) -> None:
        recorded = request.generate
        session_id = self._session_id(request)
        generate = recorded.model_copy(update={"session": session_id, "gateway": self._name})
        record = Request(
            session=session_id,
            gateway=self._name,
            prompt_len=len(recorded.prompt),
            sampling=recorded.sampling,
            stop_ids=recorded.stop_ids,
            max_tokens=recorded.max_tokens,
            fingerprint=recorded.fingerprint,
            slo=recorded.slo,
        )
        started_ms = time.time() * 1000 - recorded.elapsed_ms
        served = ServedRequest(session_id, recorded.slo, recorded.service_class, started_ms)
        self._injected[session_id] = InjectedRequest(request, session_id, served)
        await self._store.create(record, recorded.prompt, recorded.elapsed_ms)
        try:
            await self._broker.publish(generate, request.key, persistent=True)
        except Unroutable as error:
            raise BrokersError(
                f"no drafter takes {request.key} in namespace {self._broker.topology.namespace} of that virtual host: "
                "start a suite there first (WISP_AMQP_URL with the virtual host, WISP_NAMESPACE)"
            ) from error

    async def _cancel(self, session_id: str, reason: str, *, end: bool = True) -> None:
        injected = self._injected.get(session_id)
        if injected is None or injected.ended is not None:
            return
        if end:
            injected.ended = "cancelled"
        await self._store.cancel(session_id)
        await self._broker.publish(Cancel(session=session_id, reason=reason), topology.CANCEL)

    async def _wait_for_ends(self) -> None:
        """Wait until all sessions have ended, or no result arrives for `PATIENCE_S`."""
        while any(injected.ended is None for injected in self._injected.values()):
            self._received.clear()
            try:
                await asyncio.wait_for(self._received.wait(), PATIENCE_S)
            except TimeoutError:
                return

    async def _receive(self, message: Message) -> None:
        if isinstance(message, Result) and (injected := self._injected.get(message.session)) is not None:
            injected.apply(message, time.time() * 1000)
            self._received.set()
