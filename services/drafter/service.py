"""The drafter: takes requests from its pool's queue, and serves each session in a task of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from services.drafter import metrics
from services.drafter.core.lookup import LOOKUP
from services.drafter.core.profile import HardwareProfile
from services.drafter.core.session import RoundTimers
from services.drafter.drafting import Drafting, load_drafting
from services.drafter.link import Deliver, DirectLink, EmulatedLink, Link, load_profile
from services.drafter.serving import ServedSession
from services.drafter.settings import DrafterSettings, DraftServingSettings, ServingOptions
from services.drafter.worker import SourceWorker
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.incoming import GiveBack
from shared.errors import BrokersError
from shared.messages import (
    DRAFTER_BEAT_S,
    Cancel,
    DrafterHeartbeat,
    Generate,
    HiddenStates,
    Load,
    Message,
    Result,
    Verify,
)
from shared.runtime import logging, tracing
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.state.sessions import Session, SessionStatus
from shared.state.store import Store

if TYPE_CHECKING:
    from shared.grammar.token_masks import DraftGrammar

STORE_RETRY_S = 1.0
RUN_COPIES = 8
"""Most draft tokens of a step by prompt lookup in a run."""
SCHEDULERS_SILENT_S = 2.0
"""Schedulers at work publish their load more often than this."""


async def serve(settings: DrafterSettings, instance: str, stop: asyncio.Event) -> None:
    """Run a drafter until `stop` is set; the broker then gives its unfinished sessions to other drafters."""
    profile = load_profile(settings.device_profile)
    drafting = await asyncio.to_thread(load_drafting, settings)
    broker = await Broker.connect(settings.amqp_url, settings.topology, instance, settings.journal_limits, settings.tls)
    store = Store.connect(settings.redis_url, settings.namespace, tls=settings.tls)
    drafter = Drafter(instance, settings.pool, settings.options, drafting, broker, store, profile)
    try:
        await store.refuse_cluster()
        await drafter.run(stop, described(settings))
    finally:
        await broker.close()
        await store.close()


def described(settings: DraftServingSettings) -> dict[str, object]:
    """Return the settings that a drafter logs when it is ready."""
    return {"stop_rule": settings.stop_rule, "device": settings.device_profile or None}


class Drafter:
    """Serves the sessions of its pool, each until its end, or until it is given back."""

    def __init__(
        self,
        instance: str,
        pool: str,
        options: ServingOptions,
        drafting: Drafting,
        broker: Broker,
        store: Store | None,
        profile: HardwareProfile | None,
    ) -> None:
        """store: None on a device, which learns from results what is committed. profile: of the hardware that each
        session's link and drafts emulate; None emulates none."""
        self.instance = instance
        self._pool = pool
        self._options = options
        self._drafting = drafting
        self._workers = {id(source): SourceWorker(source) for source in drafting.sources.values()}
        self._broker = broker
        self._store = store
        self._profile = profile
        self._log = logging.get()
        self._sessions: dict[str, ServedSession] = {}
        self._timers = RoundTimers(options.min_timeout_ms)
        self._load_s = time.monotonic()
        """Time of the last Load."""

    async def run(self, stop: asyncio.Event, described: Mapping[str, object] | None = None) -> None:
        """Serve until `stop` is set. described: further fields of the log entry `ready`."""
        await self._broker.consume(self._broker.topology.drafter_queue(self.instance), self.receive)
        await self.take_requests()
        HEALTH.watch(self._broker, self._store)
        self._log.info(
            "ready",
            pool=self._pool,
            sources=sorted(self._drafting.sources),
            default=self._drafting.default,
            profile=self._profile.model_dump() if self._profile else None,
            **(described or {}),
        )
        with nullcontext() if self._drafting.learning is None else self._drafting.learning.running():
            await self._serve(stop)

    async def _serve(self, stop: asyncio.Event) -> None:
        loops = [worker.work() for worker in self._workers.values()]
        if await self.may_beat():
            loops.append(self.beat())
        async with running(stop, *loops):
            pass

    async def take_requests(self, priority: int = 0) -> None:
        """Serve requests from now on; other messages come by `receive`.

        priority: below 0 for a drafter that takes only the requests for which no other one of the pool has room.
        """
        await self._broker.consume(
            self._broker.topology.generate_queue(self._pool),
            self._generate,
            prefetch=self._options.max_sessions,
            priority=priority,
        )
        self._broker.on_reconnect(self._send_again)

    async def may_beat(self) -> bool:
        """Return whether this process may publish heartbeats. A device may not."""
        if self._broker.topology.device:
            return False
        allowed = await self._broker.may_publish(topology.drafter(self.instance))
        if not allowed:
            self._log.warning(
                "RabbitMQ refuses this drafter's heartbeats, so schedulers do not give it their sessions; import the "
                "output of `wisp broker definitions` of this version"
            )
        return allowed

    async def beat(self, *, drafts: bool = True) -> None:
        """Publish heartbeats for ever. drafts: False for a stand-in."""
        while True:
            heartbeat = DrafterHeartbeat(
                drafter=self.instance,
                pool=self._pool,
                sessions=len(self._sessions),
                max_sessions=self._options.max_sessions,
                drafts=drafts,
                learning=None if self._drafting.learning is None else self._drafting.learning.state,
            )
            await self._broker.publish(heartbeat, topology.drafter(self.instance))
            await asyncio.sleep(DRAFTER_BEAT_S)

    @property
    def session_ids(self) -> list[str]:
        """Sessions being served, the one with the most tokens left first."""
        kept = {name: session for name, session in self._sessions.items() if not session.given_back}
        return sorted(kept, key=lambda name: -kept[name].tokens_left)

    def give_back(self, session_id: str) -> None:
        """Return a session's request to the queue of the pool, so that another drafter goes on with it."""
        if (session := self._sessions.get(session_id)) is not None and not session.given_back:
            session.give_back()

    def _send_again(self, after_s: float = 0.0) -> None:
        """Send all rounds in flight again that were sent `after_s` ago: they or their results may be lost."""
        for session in self._sessions.values():
            session.send_again(after_s)

    async def receive(self, message: Message) -> None:
        """Take a message to this drafter, or to all drafters."""
        if isinstance(message, Load):
            self._drafting.controller.times.apply_load(message)
            now = time.monotonic()
            if now - self._load_s > SCHEDULERS_SILENT_S:
                # A scheduler has taken over, or is back. The rounds that were sent meanwhile may be lost.
                self._send_again(SCHEDULERS_SILENT_S)
            self._load_s = now
        elif (
            isinstance(message, Result | HiddenStates | Cancel)
            and (session := self._sessions.get(message.session)) is not None
        ):
            await session.receive(message)

    async def _generate(self, message: Message) -> None:
        """Serve a request to its end; returning acknowledges it."""
        if not isinstance(message, Generate):
            return
        if (served := self._sessions.get(message.session)) is not None:
            # Delivered again after a reconnect. Acknowledging this copy before the end would lose the request if this
            # process died meanwhile.
            await served.ended.wait()
            self._return_given_back(served)
            return
        session = self._sessions[message.session] = self._new_session(message)
        self._note_sessions()
        try:
            with metrics.SESSIONS.track_inprogress():
                span = tracing.current().child("take session", kind="CONSUMER")
                try:
                    is_active = await self._restore(session, message)
                    if is_active:
                        session.follow(await self._grammar(message))
                finally:
                    span.end()
                if is_active:
                    await session.run()
        finally:
            del self._sessions[message.session]
            self._note_sessions()
            session.close()
            self._drafting.close(message.session)
        if self._drafting.learning is not None and (observed := session.observed()) is not None:
            self._drafting.learning.observe(observed)
        self._return_given_back(session)

    def _note_sessions(self) -> None:
        """Let the draft learn only while no session is served."""
        if self._drafting.learning is not None:
            self._drafting.learning.serving(len(self._sessions))

    @staticmethod
    def _return_given_back(session: ServedSession) -> None:
        """Return the session's request to the queue, rather than acknowledge it, if it was given back."""
        if session.given_back and not session.done:
            raise GiveBack

    def _new_session(self, generate: Generate) -> ServedSession:
        choice = self._drafting.choose(generate)
        reads_states = choice.reads_hidden_states and self._options.draft_length > 0
        learning = self._drafting.learning if reads_states else None
        return ServedSession(
            generate,
            self.instance,
            self._options,
            self._timers,
            self._workers[id(choice.source)],
            choice.token_sources,
            self._drafting.controller.session(
                *choice.token_sources,
                copying=(LOOKUP,),
                tpot_ms=None if generate.slo is None else generate.slo.tpot_ms,
            ),
            self._drafting.hidden_rows() if reads_states else None,
            RUN_COPIES if choice.run_copies else 0,
            partial(self._open_link, generate.session),
            learning.recorder(generate) if learning is not None else None,
        )

    async def _grammar(self, generate: Generate) -> DraftGrammar | None:
        """Return the grammar of a session's drafts, built in a thread: the first one loads the vocabulary."""
        if generate.sampling.grammar is None:
            return None
        return await asyncio.to_thread(self._drafting.grammar, generate)

    def _open_link(self, session_id: str, deliver: Deliver) -> Link:
        if self._profile is None:
            return DirectLink(self._publish, deliver)
        return EmulatedLink(self._profile, session_id, self._publish, deliver)

    async def _publish(self, verify: Verify) -> None:
        session = self._sessions.get(verify.session)
        await self._broker.publish(verify, topology.VERIFY, trace=session.trace_headers if session else None)

    async def _restore(self, session: ServedSession, generate: Generate) -> bool:
        """Continue from the stored session's committed tokens; return False if it is over or gone."""
        if self._store is None:
            return True
        stored = await self._stored(self._store, generate.session)
        if stored is None or stored.status is not SessionStatus.ACTIVE:
            self._log.info("nothing to do", status=stored.status if stored else "gone")
            return False
        session.restore(stored)
        return True

    async def _stored(self, store: Store, session_id: str) -> Session | None:
        while True:
            try:
                return (await store.read([session_id]))[0]
            except BrokersError as error:
                self._log.warning("waiting for Redis", error=str(error))
                await asyncio.sleep(STORE_RETRY_S)
