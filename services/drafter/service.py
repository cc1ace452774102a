"""The drafter's loop: one coroutine per session, drafting together what is ready together."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import structlog

from services.drafter import metrics
from services.drafter.control import Round
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.profile import DeviceProfile
from services.drafter.core.session import DraftSession, judged
from services.drafter.core.timeout import RoundTimer
from services.drafter.drafting import Drafting, load_drafting
from services.drafter.link import EmulatedDevice, load_profile
from services.drafter.serving import AheadInMaking, Serving
from services.drafter.settings import DrafterSettings
from services.drafter.sources import Draft, DraftRequest
from services.drafter.worker import SourceWorker
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import BrokersError, MessageError
from shared.messages import Cancel, Generate, HiddenFormat, HiddenStates, Load, Message, Result, Status, Verify
from shared.runtime import logging
from shared.runtime.health import HEALTH
from shared.runtime.service import running
from shared.state.store import Session, SessionStatus, Store

STORE_RETRY_S = 1.0


async def serve(settings: DrafterSettings, instance: str, stop: asyncio.Event) -> None:
    """Run a drafter until `stop` is set; its unfinished sessions are then given to other drafters by the broker."""
    profile = load_profile(settings.device_profile)
    drafting = await asyncio.to_thread(load_drafting, settings)
    broker = await Broker.connect(
        settings.amqp_url, Topology(settings.namespace), instance, settings.journal_limits, settings.tls
    )
    store = Store.connect(settings.redis_url, settings.namespace, settings.session_ttl_s, settings.tls)
    drafter = Drafter(instance, settings, drafting, broker, store, profile)
    try:
        await drafter.run(stop)
    finally:
        await broker.close()
        await store.close()


class Drafter:
    """Takes requests from its pool and sees each through."""

    def __init__(
        self,
        instance: str,
        settings: DrafterSettings,
        drafting: Drafting,
        broker: Broker,
        store: Store | None,
        profile: DeviceProfile | None,
    ) -> None:
        """store: None on a device, which learns from results what is committed. profile: of the device that each
        session stands for; None emulates none."""
        self.instance = instance
        self._settings = settings
        self._drafting = drafting
        self._controller = drafting.controller
        self._workers = {id(source): SourceWorker(source) for source in drafting.sources.values()}
        self._broker = broker
        self._store = store
        self._profile = profile
        self._log = logging.get()
        self._results: dict[str, asyncio.Queue[Result | Cancel]] = {}
        self._states: dict[str, HiddenRows] = {}
        self._devices: dict[str, EmulatedDevice] = {}
        self._served: dict[str, asyncio.Event] = {}
        self._first_rounds = RoundTimer(settings.min_timeout_ms)
        self._later_rounds = RoundTimer(settings.min_timeout_ms)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`."""
        names = self._broker.topology
        await self._broker.consume(names.drafter_queue(self.instance), self._receive)
        await self._broker.consume(
            names.generate_queue(self._settings.pool), self._generate, prefetch=self._settings.max_sessions
        )
        HEALTH.watch(self._broker, self._store)
        self._log.info(
            "ready",
            pool=self._settings.pool,
            sources=sorted(self._drafting.sources),
            default=self._drafting.default,
            stop_rule=self._settings.stop_rule,
            device=self._settings.device_profile or None,
            profile=self._profile.model_dump() if self._profile else None,
        )
        async with running(stop, *(worker.work() for worker in self._workers.values())):
            pass

    async def _receive(self, message: Message) -> None:
        if isinstance(message, Load):
            self._controller.pace.hear(message)
        elif isinstance(message, Result | HiddenStates):
            if (device := self._devices.get(message.session)) is not None:
                device.receive(message)
            else:
                await self._arrive(message)
        elif isinstance(message, Cancel):
            if (device := self._devices.get(message.session)) is not None:
                device.cancel()
            if (waiting := self._results.get(message.session)) is not None:
                waiting.put_nowait(message)

    async def _arrive(self, message: Result | HiddenStates) -> None:
        """Take in what has reached the session's device."""
        if isinstance(message, Result):
            if (waiting := self._results.get(message.session)) is not None:
                waiting.put_nowait(message)
        elif (rows := self._states.get(message.session)) is not None:
            try:
                rows.add(message)
            except MessageError as error:
                self._log.warning("hidden states ignored", error=str(error))

    async def _generate(self, message: Message) -> None:
        if not isinstance(message, Generate):
            return
        if (served := self._served.get(message.session)) is not None:
            # Delivered again after a reconnect. Acknowledging this copy before the end would lose the request if this
            # process died meanwhile.
            await served.wait()
            return
        self._served[message.session] = asyncio.Event()
        self._results[message.session] = asyncio.Queue()
        try:
            with metrics.SESSIONS.track_inprogress():
                await self._serve(message)
        finally:
            self._served.pop(message.session).set()
            del self._results[message.session]

    async def _serve(self, generate: Generate) -> None:
        started = time.monotonic()
        if self._store is None:
            # As if nothing was committed yet. If that is wrong, the first round is told what is.
            session, prior_ms = DraftSession(generate, list(generate.prompt)), generate.elapsed_ms
        else:
            stored = await self._stored(self._store, generate.session)
            if stored is None or stored.status is not SessionStatus.ACTIVE:
                self._log.info("nothing to do", status=stored.status if stored else "gone")
                return
            session = DraftSession(generate, stored.tokens, round=stored.round + 1, first_ms=stored.first_ms)
            prior_ms = max(stored.elapsed_ms, generate.elapsed_ms)
        choice = self._drafting.choose(generate)
        wanted = choice.reads_states and self._settings.draft_length > 0
        states = self._drafting.states() if wanted else None
        worker = self._workers[id(choice.source)]
        device = None
        if self._profile is not None:
            device = EmulatedDevice(self._profile, session.name, self._publish, self._arrive)
            self._devices[session.name] = device
        serving = Serving(session, worker, choice.names, self._controller.session(*choice.names), states, device)
        if states is not None:
            self._states[session.name] = states
        try:
            while not session.done:
                with structlog.contextvars.bound_contextvars(round=session.round):
                    elapsed_ms = prior_ms + (time.monotonic() - started) * 1000
                    if not await self._round(serving, elapsed_ms):
                        return
                    if session.first_ms is None and session.output_tokens:
                        session.first_ms = prior_ms + (time.monotonic() - started) * 1000
        finally:
            self._states.pop(session.name, None)
            if device is not None:
                del self._devices[session.name]
                device.close()
            worker.close(session.name)
        if session.failure is not None:
            self._log.warning("session failed", code=session.failure.code, error=session.failure.message)

    async def _stored(self, store: Store, session: str) -> Session | None:
        while True:
            try:
                return (await store.read([session]))[0]
            except BrokersError as error:
                self._log.warning("waiting for Redis", error=str(error))
                await asyncio.sleep(STORE_RETRY_S)

    async def _round(self, serving: Serving, elapsed_ms: float) -> bool:
        """Draft, have it verified, take the result in; False when the session was cancelled."""
        started = time.monotonic()
        session, control = serving.session, serving.control
        draft, round_, request, draft_ms = await self._draft(serving)
        if serving.device is not None:
            real_ms = (time.monotonic() - started) * 1000
            metrics.DEVICE_LATE.inc(max(0.0, real_ms - draft_ms) / 1000)
            if not await serving.device.pause(draft_ms - real_ms):
                return False
        metrics.DRAFT_TIME.observe(draft_ms / 1000)
        timer = self._first_rounds if session.output_tokens == 0 else self._later_rounds
        wanted = None
        if serving.states is not None and not control.resting:
            wanted = serving.states.wanted(len(session.tokens))
        base_len = len(session.tokens)
        attempt = 0
        ahead = None
        while True:
            sent = time.monotonic()
            verify = session.verify(
                draft.tokens,
                round_.acceptance,
                self.instance,
                # Slack is told as it will be when the round arrives.
                elapsed_ms + (sent - started) * 1000 + control.pace.one_way_ms,
                draft_ms,
                attempt,
                wanted,
                HiddenFormat(self._settings.hidden_format),
            )
            self._log.debug("round sent", draft=len(verify.draft), attempt=attempt)
            if serving.device is not None:
                serving.device.send(verify)
            else:
                await self._publish(verify)
            if ahead is None:
                ahead = self._draft_ahead(serving, request, draft)
            result = await self._result(session, timer.timeout_ms(attempt) / 1000)
            if result is not None:
                break
            attempt += 1
            metrics.ROUNDS_RESENT.inc()
            self._log.info("round is late, sending it again", attempt=attempt)
        if isinstance(result, Cancel):
            return False
        round_ms = (time.monotonic() - sent) * 1000
        self._log.debug("round settled", status=result.status, accepted=result.accepted, tokens=len(result.tokens))
        metrics.ROUND_TIME.observe(round_ms / 1000)
        # A conflict or a failure says nothing of this draft, nor of the time that verifying takes.
        committed = result.status is Status.COMMITTED
        if attempt == 0:
            timer.learn(round_ms)
        if attempt == 0 and committed:
            control.pace.learn_round(result.trimmed_to, round_ms, result.verify_ms, result.queue_ms, result.new_tokens)
        verified, accepted = judged(result) if committed else (0, 0)
        control.settle(round_, verified, accepted)
        metrics.count(round_, verified, accepted, draft)
        if serving.states is not None and len(session.tokens) < base_len:
            serving.states.truncate(len(session.tokens))
        serving.ahead = None if ahead is None else ahead.made(serving.device)
        return True

    async def _publish(self, verify: Verify) -> None:
        await self._broker.publish(verify, topology.VERIFY)

    async def _draft(self, serving: Serving) -> tuple[Draft, Round, DraftRequest, float]:
        """The round's draft: the one made ahead if what it was made for has come true, else a new one; and the
        milliseconds that it took, or takes on the emulated device."""
        started = time.monotonic()
        session, control = serving.session, serving.control
        ahead, serving.ahead = serving.ahead, None
        if ahead is not None:
            assumed, draft, round_ = ahead
            kept = bool(draft.tokens) and assumed == session.tokens
            metrics.AHEAD.labels("kept" if kept else "dropped").inc()
            if kept:
                return draft, round_, serving.request(round_), 0.0
        room = session.draft_room(self._settings.draft_length)
        round_ = control.begin(room, session.generate.sampling.temperature)
        request = serving.request(round_)
        draft, took_ms = await serving.worker.draft(request)
        round_.cut(len(draft.tokens))
        if self._profile is not None:
            for source, steps in draft.steps.items():
                control.pace.learn_draft(source, steps, self._profile.steps_ms(steps))
            return draft, round_, request, self._profile.draft_ms(draft)
        for source, steps in draft.steps.items():
            control.pace.learn_draft(source, steps, took_ms, draft.computed)
        return draft, round_, request, (time.monotonic() - started) * 1000

    def _draft_ahead(self, serving: Serving, request: DraftRequest, draft: Draft) -> AheadInMaking | None:
        """Start drafting for the round after this one, as if all of this draft were accepted."""
        session, control = serving.session, serving.control
        if not self._settings.optimistic or control.resting:
            return None
        room = session.draft_room(self._settings.draft_length, assumed=len(draft.tokens) + 1)
        round_ = control.ahead(room, session.generate.sampling.temperature)
        if round_.longest == 0:
            return None
        # A copy of the tokens: the result may extend them while the source still drafts in its thread.
        following = replace(request, tokens=list(request.tokens), round=round_, states=None)
        answer = serving.worker.ahead(following, draft)
        if answer is None:
            return None
        return AheadInMaking([*session.tokens, *draft.tokens], round_, answer, time.monotonic())

    async def _result(self, session: DraftSession, timeout_s: float) -> Result | Cancel | None:
        """The message that settles the round in flight; None when it does not come in time."""
        inbox = self._results[session.name]
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await inbox.get()
                    if isinstance(message, Cancel) or session.apply(message):
                        return message
        except TimeoutError:
            return None
