"""Sessions of a verifier: their committed tokens and their KV."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.verifier import metrics
from services.verifier.core.tasks import VerifyTask
from services.verifier.engine_thread import EngineThread
from shared.errors import BrokersError
from shared.messages import Job
from shared.runtime import logging
from shared.state.commits import CommitOutcome, Committed
from shared.state.sessions import Request, SessionStatus
from shared.state.store import Store

if TYPE_CHECKING:
    from shared.grammar.masks import Grammars

SWEEP_S = 5.0
"""A cached session without a job for this long may have ended while this verifier was cut off."""

MOST_REMEMBERED = 10_000
"""Most sessions remembered. Sessions that moved away or were abandoned are never mentioned again; the oldest are
dropped."""


@dataclass
class CommittedSession:
    """A session as this verifier last committed or read it."""

    request: Request
    tokens: list[int]


class SessionTable:
    """The sessions that this verifier remembers, and those with KV in its engine."""

    def __init__(self, store: Store, engine_thread: EngineThread, grammars: Grammars | None = None) -> None:
        """grammars: those of the sessions; None if the verifier follows none."""
        self._store = store
        self._grammars = grammars
        self._thread = engine_thread
        self._engine = engine_thread.engine
        self._remembered: dict[str, CommittedSession] = {}
        self._last_job_s: dict[str, float] = {}
        """Time of the last job of each cached session, in seconds of the monotonic clock."""
        self._log = logging.get()
        self.cached: dict[str, int] = {}
        """Tokens in the engine's cache, by session. Replaced, never changed: two threads read it."""

    def touch(self, jobs: Iterable[Job]) -> None:
        """Note that these sessions are in use."""
        now = time.monotonic()
        self._last_job_s |= {job.session: now for job in jobs}

    def remembers(self, job: Job) -> bool:
        """Return whether the session is remembered at the length that the job builds on."""
        session = self._remembered.get(job.session)
        return session is not None and len(session.tokens) == job.base_len

    async def recall(self, jobs: Sequence[Job]) -> None:
        """Read the sessions of jobs from the store that are not remembered. Sessions that have ended are dropped."""
        unknown = [job for job in jobs if not self.remembers(job)]
        if not unknown:
            return
        for job, session in zip(unknown, await self._store.read([job.session for job in unknown]), strict=True):
            if session is not None and session.status is SessionStatus.ACTIVE:
                self._remembered[job.session] = CommittedSession(session.request, session.tokens)
            else:
                self.drop(job.session)
        while len(self._remembered) > MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def tokens(self, session_id: str) -> list[int]:
        """Return the committed tokens of a remembered session."""
        return self._remembered[session_id].tokens

    def all_tokens(self) -> dict[str, list[int]]:
        """Return the committed tokens of every remembered session."""
        return {session_id: session.tokens for session_id, session in self._remembered.items()}

    def task(self, job: Job) -> VerifyTask:
        """Return the input of verification for a job of a remembered session."""
        session = self._remembered[job.session]
        return VerifyTask(
            session_id=job.session,
            # A copy: the reply to an earlier batch may extend the session while the model still works on this one.
            tokens=list(session.tokens),
            draft=job.draft,
            sampling=session.request.sampling,
            stop_ids=frozenset(session.request.stop_ids),
            room=session.request.max_length - len(session.tokens),
            prompt_len=session.request.prompt_len,
            prefill_to=job.prefill_to,
            hidden_from=job.hidden_from,
            hidden_format=job.hidden_format,
        )

    def update_cached(self, session_ids: Iterable[str]) -> None:
        """Read from the engine what it holds of these and all cached sessions. Call it in the engine's thread."""
        held = {session_id: self._engine.cached(session_id) for session_id in {*self.cached, *session_ids}}
        self.cached = {session_id: cached for session_id, cached in held.items() if cached}

    def apply(self, session_id: str, answer: Committed) -> bool:
        """Apply the commit script's answer to a session; return whether it goes on with new committed tokens."""
        session = self._remembered.get(session_id)
        if answer.outcome is CommitOutcome.COMMITTED and not answer.ended and session is not None:
            session.tokens[answer.base_len :] = answer.tokens
            return True
        return False

    def drop(self, session_id: str) -> None:
        """Forget the committed tokens of a session; they are read from the store when they are needed."""
        self._remembered.pop(session_id, None)

    async def release(self, session_ids: Sequence[str]) -> None:
        """Forget sessions, their states in their grammars too, and release their KV."""
        if self._grammars is not None:
            for session_id in session_ids:
                self._grammars.forget(session_id)
        gone = [session_id for session_id in session_ids if session_id in self.cached or session_id in self._remembered]
        if not gone:
            return
        for session_id in gone:
            self.drop(session_id)

        def release() -> None:
            for session_id in gone:
                self._engine.release(session_id)
            self.cached = {s: cached for s, cached in self.cached.items() if s not in gone}

        await self._thread.run(release)

    async def sweep(self) -> None:
        """Release, for ever, the KV of sessions that ended while this verifier or its connection was away."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            self._last_job_s = {s: at for s, at in self._last_job_s.items() if s in self.cached}
            silent = [s for s in self.cached if now - self._last_job_s.setdefault(s, now) >= SWEEP_S]
            if silent:
                with suppress(BrokersError):  # tried again with the next sweep
                    await self.release(await self._store.ended(silent))

    async def check_integrity(self) -> None:
        """Check the accounting of the KV cache. If it is wrong, drop the whole cache.

        With wrong accounting a session may attend to another session's KV. Every session is prefilled again with its
        next job, and so gets the right completion from there on.
        """
        sessions = len(self.cached)
        try:
            await self._thread.run(self._check_or_reset)
        except AssertionError as error:
            metrics.INTEGRITY_ERRORS.inc()
            self._log.error(
                "KV cache accounting is wrong: the cache is dropped, sessions are prefilled again",
                error=str(error),
                sessions=sessions,
            )

    def _check_or_reset(self) -> None:
        """Check the cache, and drop it before the next step if it is wrong. Raises AssertionError."""
        try:
            self._engine.integrity()
        except AssertionError:
            self._engine.reset()
            self.cached = {}
            raise
