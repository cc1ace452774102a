"""Recorded requests asked again of a suite in another virtual host. Talks to its broker and its Redis, as a gateway
does."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from secrets import token_hex
from urllib.parse import quote, urlsplit, urlunsplit

from services.tools.replayer.core.injection import Again, Answers, Asked, answers, requests_of
from services.tools.replayer.core.performance import Served
from services.tools.replayer.core.recording import Recording, RecordingError, Source
from services.tools.replayer.journal import connected, source_of, vhost_of
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import BrokersError, Unroutable
from shared.messages import Cancel, Message, Result
from shared.runtime.settings import TlsSettings
from shared.state.store import Request, Store

PATIENCE_S = 60.0
"""Sessions of which nothing is heard for this long after the last was sent are given up."""
TTL_S = 900


def in_vhost(amqp_url: str, vhost: str) -> str:
    """The broker's address with another virtual host. Raises RecordingError where that is the address's own."""
    parts = urlsplit(amqp_url)
    own = vhost_of(amqp_url)
    if vhost == own:
        raise RecordingError(
            f"virtual host {vhost!r} is the one that {parts.hostname} is used with here, so it is the live one; inject "
            "into another (--vhost), in which a suite of its own runs"
        )
    return urlunsplit(parts._replace(path="/" + quote(vhost, safe="")))


def refuse_live(recorded: Source, target: Source) -> None:
    """Raises RecordingError where a recording would go back to where it comes from."""
    if recorded.vhost != target.vhost:
        return
    known = {recorded.cluster, recorded.address} - {""}
    if not known or known & {target.cluster, target.address}:
        raise RecordingError(
            f"the recording was made in virtual host {target.vhost!r} of {target.address}, so that is the live one; "
            "inject into another (--vhost), in which a suite of its own runs"
        )


async def inject(amqp_url: str, redis_url: str, namespace: str, recording: Recording, speed: float) -> Answers:
    """Ask the recorded requests again, `speed` times as fast as they came, and wait for their ends.

    amqp_url: the other virtual host. namespace, redis_url: of the suite that runs there. Raises RecordingError where
    there is nothing to ask or the place is the live one, BrokersError where nobody is there.
    """
    recording.refuse_redacted("inject")
    asked = requests_of(recording)
    if not asked:
        raise RecordingError("no request's beginning is in the recording: nothing to inject")
    async with connected(amqp_url) as connection:
        refuse_live(recording.source, source_of(connection, amqp_url, namespace))
    name = f"inject-{token_hex(3)}"
    tls = TlsSettings().tls
    broker = await Broker.connect(amqp_url, Topology(namespace), name, tls=tls)
    store = Store.connect(redis_url, namespace, TTL_S, tls)
    try:
        return await _Injection(name, broker, store, asked, speed).run()
    finally:
        await broker.close()
        await store.close()


class _Injection:
    """One injection. It is the gateway of its sessions, which have names of their own."""

    def __init__(self, name: str, broker: Broker, store: Store, asked: list[Asked], speed: float) -> None:
        self._name = name
        self._broker = broker
        self._store = store
        self._asked = asked
        self._speed = speed
        self._again: dict[str, Again] = {}
        self._heard = asyncio.Event()
        self._late_ms = 0.0
        self._start_s = 0.0

    async def run(self) -> Answers:
        await self._store.ping()
        queue = self._broker.topology.own_queue("inject", self._name, (topology.result(self._name),))
        await self._broker.consume(queue, self._receive)
        self._start_s = time.monotonic()
        steps: list[tuple[float, Asked, bool]] = [(one.at_ms, one, False) for one in self._asked]
        steps += [(one.cancel_ms, one, True) for one in self._asked if one.cancel_ms is not None]
        begin_ms = self._asked[0].at_ms
        try:
            for at_ms, asked, cancel in sorted(steps, key=lambda step: (step[0], step[2])):
                await self._until(max(0.0, at_ms - begin_ms) / self._speed / 1000)
                if cancel:
                    await self._cancel(self._named(asked), "cancelled in the recording")
                else:
                    await self._ask(asked)
            await self._ends()
        finally:
            # Whoever interrupts this does not leave work behind.
            for one in self._again.values():
                if one.ended is None:
                    with suppress(BrokersError):
                        await self._cancel(one.session, "injection over", end=False)
        return answers(list(self._again.values()), self._late_ms)

    def _named(self, asked: Asked) -> str:
        """A name that nobody there knows, with an end by which people know it."""
        return f"{self._name}-{asked.generate.session[-100:]}"

    async def _until(self, due_s: float) -> None:
        wait_s = due_s - (time.monotonic() - self._start_s)
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        else:
            self._late_ms = max(self._late_ms, -wait_s * 1000)

    async def _ask(self, asked: Asked) -> None:
        old = asked.generate
        session = self._named(asked)
        generate = old.model_copy(update={"session": session, "gateway": self._name})
        record = Request(
            session=session,
            gateway=self._name,
            prompt_len=len(old.prompt),
            sampling=old.sampling,
            stop_ids=old.stop_ids,
            max_tokens=old.max_tokens,
            fingerprint=old.fingerprint,
            slo=old.slo,
        )
        started_ms = time.time() * 1000 - old.elapsed_ms
        self._again[session] = Again(asked, session, Served(session, old.slo, old.service_class, started_ms))
        await self._store.create(record, old.prompt, old.elapsed_ms)
        try:
            await self._broker.publish(generate, asked.key, persistent=True)
        except Unroutable as error:
            raise BrokersError(
                f"no drafter takes {asked.key} in namespace {self._broker.topology.namespace} of that virtual host: "
                "start a suite there first (WISP_AMQP_URL with the virtual host, WISP_NAMESPACE)"
            ) from error

    async def _cancel(self, session: str, reason: str, *, end: bool = True) -> None:
        again = self._again.get(session)
        if again is None or again.ended is not None:
            return
        if end:
            again.ended = "cancelled"
        await self._store.cancel(session)
        await self._broker.publish(Cancel(session=session, reason=reason), topology.CANCEL)

    async def _ends(self) -> None:
        """Wait until all have ended, or nothing is heard for long."""
        while any(one.ended is None for one in self._again.values()):
            self._heard.clear()
            try:
                await asyncio.wait_for(self._heard.wait(), PATIENCE_S)
            except TimeoutError:
                return

    async def _receive(self, message: Message) -> None:
        if isinstance(message, Result) and (again := self._again.get(message.session)) is not None:
            again.take(message, time.time() * 1000)
            self._heard.set()
