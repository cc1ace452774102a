"""The stand-in for drafters: serves a pool's requests without drafts while no drafter has room for them.

It is a drafter without a draft source, whose consumer has a lower priority than those of drafters: RabbitMQ gives it a
request only while the pool's drafters are away or have no room. The request stays unacknowledged as with any drafter,
so another process goes on with it if this one dies. When a drafter has room, the stand-in returns requests to the
queue, and the drafter continues from the committed tokens.

Results reach it by way of the scheduler, which gets a copy of each: receiving them a second time would double the time
that the scheduler's event loop spends on a run.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine, Sequence
from typing import Any

from services.drafter.drafting import no_drafting
from services.drafter.service import Drafter
from services.drafter.settings import ServingOptions
from services.scheduler import metrics
from services.scheduler.core.drafter_pools import DrafterPools, SessionMoves
from shared.broker import topology
from shared.broker.client import Broker
from shared.errors import AccessRefused
from shared.messages import Cancel, DrafterHeartbeat, Load, Message, Result
from shared.runtime import logging
from shared.state.store import Store

PRIORITY = -1
"""Priority of the stand-in's consumers; drafters have 0."""
TIMEOUT_MS = 250.0
"""Shortest wait for a round's result."""


class StandIn:
    """Stands in for the drafters of some pools, in one scheduler process."""

    def __init__(
        self, scheduler_id: str, pools: Sequence[str], max_sessions: int, broker: Broker, store: Store
    ) -> None:
        """max_sessions: served at once, of each pool."""
        self._scheduler_id = scheduler_id
        self._broker = broker
        self._pools = DrafterPools(pools, _now_ms())
        options = ServingOptions(max_sessions, TIMEOUT_MS, draft_length=0)
        drafting = no_drafting()
        self._serving = {
            pool: Drafter(f"{scheduler_id}.{pool}", pool, options, drafting, broker, store, None) for pool in pools
        }
        self._moves = SessionMoves()
        self._log = logging.get()

    async def join(self) -> list[Coroutine[Any, Any, None]]:
        """Serve from now on; return the loops to run meanwhile: none if this process lacks the permissions."""
        names = self._broker.topology
        own = names.own_queue("scheduler", f"{self._scheduler_id}.drafters", (topology.drafter("*"), topology.LOAD))
        loops = []
        try:
            if not await self._broker.may_publish(topology.VERIFY):
                raise AccessRefused("RabbitMQ refuses rounds of this user")
            await self._broker.consume(own, self._receive)
            for drafter in self._serving.values():
                await drafter.take_requests(PRIORITY)
                if await drafter.may_beat():
                    loops.append(drafter.beat(drafts=False))
        except AccessRefused as error:
            self._pools = DrafterPools([], _now_ms())  # without heartbeats and sessions, it reports no pool
            self._log.warning(
                "pools without drafters are not served: import the output of `wisp broker definitions` of this version",
                error=str(error),
            )
        return loops

    def without_drafters(self) -> list[str]:
        """Return the pools that have no drafter now."""
        return self._pools.without_drafters(_now_ms())

    def on_pause(self, paused_ms: float) -> None:
        """Note that this process has not run for this time."""
        self._pools.on_pause(paused_ms)

    def notes(self) -> dict[str, str]:
        """Return what `/ready` reports beside problems."""
        return {
            topology.pool_in_words(pool): "no drafter; sessions decoded without drafts: "
            f"{len(self._serving[pool].session_ids)}"
            for pool in self.without_drafters()
        }

    async def receive(self, message: Result | Cancel) -> None:
        """Take a message that the scheduler has received, if it is about a session that is served here."""
        for serving in self._serving.values():
            await serving.receive(message)

    async def _receive(self, message: Message) -> None:
        """Take the verifiers' load, or a drafter's heartbeat, and give sessions to a drafter that has room."""
        if isinstance(message, Load):
            for serving in self._serving.values():
                await serving.receive(message)
        elif isinstance(message, DrafterHeartbeat):
            self._on_heartbeat(message)

    def _on_heartbeat(self, message: DrafterHeartbeat) -> None:
        self._pools.on_heartbeat(message, _now_ms())
        if (serving := self._serving.get(message.pool)) is None:
            return
        if message.drafter == serving.instance:
            metrics.STAND_IN_SESSIONS.labels(message.pool).set(len(serving.session_ids))
        for session_id in self._moves.choose(message, serving.session_ids):
            self._log.info("session given to a drafter", session=session_id, drafter=message.drafter)
            metrics.GIVEN_TO_DRAFTERS.labels(message.pool).inc()
            serving.give_back(session_id)


def _now_ms() -> float:
    return time.monotonic() * 1000
