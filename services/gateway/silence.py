"""Watch over silent sessions: read their state from Redis, and give up those on which nobody works."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from time import monotonic
from typing import Protocol

from services.gateway.answer import RunningSession
from services.gateway.core.turns import TurnOrder
from services.gateway.transport import Transport
from shared.arithmetic import fits
from shared.errors import BrokersError
from shared.messages import Failure
from shared.runtime import logging
from shared.runtime.service import BackgroundTasks
from shared.state.sessions import SessionStatus

WATCH_INTERVAL_S = 0.1
LONGEST_PAUSE_S = 15.0
"""Longest time between two reads of a silent session's state."""
PAUSE_S = 1.0
"""A longer delay of the watch is a pause: the machine or this process stood still, and the sessions lost no time."""
READS_OF_TURNS = 4
"""Reads of other gateways' turns within the stall timeout, while a session waits for its first turn."""
CANCELLED = Failure(
    code="cancelled",
    message="this session was cancelled: its gateway gave no sign of life for longer than WISP_RESUME_S, or another "
    "one ended it; send the request again",
)
GONE = Failure(
    code="session_gone",
    message="the state of this session was lost: Redis does not have it any more; send the request again",
)


class Owner(Protocol):
    """The part of `Sessions` that the watch calls."""

    def fed(self, session: RunningSession, new_tokens: int, progressed: bool) -> None:
        """Go on after a session has got tokens, or made progress without any."""

    def fail(self, session: RunningSession, failure: Failure) -> None:
        """End a session with a failure."""


class SilenceWatch:
    """Watches the running sessions of a gateway for silence."""

    def __init__(
        self,
        owner: Owner,
        running: Mapping[str, RunningSession],
        transport: Transport,
        tasks: BackgroundTasks,
        *,
        stall_timeout_s: float,
        queue_timeout_s: float,
        arithmetics: Callable[[], Collection[str]],
    ) -> None:
        """`running`: the owner's sessions by id. The rest as for `Sessions`."""
        self._owner = owner
        self._running = running
        self._transport = transport
        self._tasks = tasks
        self._stall_timeout_s = stall_timeout_s
        self._queue_timeout_s = queue_timeout_s
        self._arithmetics = arithmetics
        self._turns_read_s = -math.inf
        """When the turns of other gateways' sessions were read."""
        self._log = logging.get()
        self.turns = TurnOrder()
        self.mixes = False
        """True if schedulers let sessions continue in another arithmetic."""

    async def watch(self) -> None:
        """Watch silent sessions for ever: read their state, and give them up after a long stall or wait."""
        before = monotonic()
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            before, paused_s = (now := monotonic()), now - before - WATCH_INTERVAL_S
            self.turns.forget(now - 2 * self._stall_timeout_s - max(0.0, paused_s))
            for session in tuple(self._running.values()):
                if paused_s > PAUSE_S:
                    session.wait.paused_s += paused_s
                idle_s = self.turns.idle_s(session.wait, now)
                if not session.wait.had_turn and idle_s >= self._stall_timeout_s / READS_OF_TURNS:
                    self._read_turns(now)
                if idle_s >= self._stall_timeout_s:
                    self._owner.fail(session, self._stalled(session, now))
                elif now - session.wait.since_s >= self._queue_timeout_s:
                    self._owner.fail(session, self._waited_too_long(session, now))
                elif now >= session.check_s and not session.starting:
                    session.pause_s = min(2 * session.pause_s, LONGEST_PAUSE_S)
                    session.check_s = now + session.pause_s
                    self.check(session)

    def _read_turns(self, now: float) -> None:
        """Read the turns of other gateways' sessions, unless it was done a moment ago."""
        if now - self._turns_read_s >= self._stall_timeout_s / READS_OF_TURNS:
            self._turns_read_s = now
            self._tasks.spawn(self._learn_turns())

    async def _learn_turns(self) -> None:
        try:
            turns = await self._transport.turns()
        except BrokersError as error:
            self._log.warning("turns of other gateways' sessions not read", error=str(error))
            return
        now = monotonic()
        for turn in turns:
            if turn.session_id not in self._running:
                self.turns.record_elsewhere(turn.pool, now - turn.age_ms / 1000, now - turn.idle_ms / 1000)

    def _stalled(self, session: RunningSession, now: float) -> Failure:
        """Return the failure of a session on which nobody works, with the reason."""
        committed_in, running = session.completion.committed_in, self._arithmetics()
        if running and not self.mixes and not any(fits(arithmetic, committed_in) for arithmetic in running):
            code = "arithmetic_unavailable"
            reason = (
                f"its tokens were computed in the arithmetic {' and '.join(committed_in)}, and the running verifiers "
                f"have another ({'; '.join(sorted(running))}); send the request again, or let schedulers move sessions "
                "to another arithmetic (WISP_MIXED_ARITHMETIC=allow)"
            )
        else:
            code = "timeout"
            reason = f"{self._transport.stall_reason.format(pool=session.answer.form.pool)}; try again later"
        return Failure(code=code, message=f"no token came for {now - session.wait.since_s:.3g} s: {reason}")

    def _waited_too_long(self, session: RunningSession, now: float) -> Failure:
        """Return the failure of a session whose turn did not come in time, because others were served before it."""
        text = (
            f"this request waited {now - session.wait.since_s:.3g} s for its turn while others were served before it; "
            f"the limit is {self._queue_timeout_s:g} s (WISP_QUEUE_TIMEOUT_S); try again later"
        )
        return Failure(code="queue_timeout", message=text)

    def check(self, session: RunningSession) -> None:
        """Read a session's state, once more if a read is in progress."""
        session.check_again = session.checking
        if not session.checking:
            session.checking = True
            self._tasks.spawn(self._repair(session))

    async def _repair(self, session: RunningSession) -> None:
        """Add committed tokens from Redis, whose results were lost."""
        completion = session.completion
        from_len = completion.length
        try:
            progress = await self._transport.progress(session.session_id, from_len)
        except BrokersError as error:
            self._log.warning("session's state not read", session=session.session_id, error=str(error))
            return
        finally:
            session.checking = False
        if self._running.get(session.session_id) is not session:
            return
        if progress is None:
            self._owner.fail(session, GONE)
            return
        tokens, length = completion.tally.tokens, completion.length
        completion.committed(
            from_len,
            progress.tokens,
            progress.finish,
            committed_in=progress.committed_in,
            logprobs=(progress.logprobs, completion.first_logprob),
        )
        if progress.status is SessionStatus.CANCELLED and not completion.done:
            self._owner.fail(session, CANCELLED)
            return
        if session.check_again:
            self.check(session)
        if completion.length > length or completion.done:
            self._log.info("session repaired", session=session.session_id, tokens=completion.length - length)
            self._owner.fed(session, completion.tally.tokens - tokens, progressed=True)
