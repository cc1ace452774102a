"""The verifiers that are running, according to their heartbeats in Redis, and the services that are missing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from time import monotonic

from services.gateway import metrics
from services.gateway.errors import ApiError, unavailable
from shared.arithmetic import distinct
from shared.errors import BrokersError
from shared.messages import Heartbeat
from shared.runtime import logging

FOLLOW_S = 5.0
"""Time between two reads of the heartbeats without requests."""
FRESH_S = 1.0
"""Time for which read heartbeats are used."""
RETRY_S = 0.25
"""Time between two reads for a request that waits."""
READ_TIMEOUT_S = 3.0
PROBE_TIMEOUT_S = 2.0

PASSING = ("no_verifier", "redis_unavailable")
"""Codes of problems that a pause of the machine causes too, for a moment: heartbeats expire while it stands still."""

Probe = Callable[[], Awaitable[object]]


def longest_session(
    heartbeats: Sequence[Heartbeat], fingerprint: str, silent_s: float = 0.0, needs: Collection[str] = ()
) -> int:
    """Return the most tokens of a session that some verifier takes now, with the features that the session `needs`.

    Raises ApiError with status 503 and the reason when there is no such verifier. `silent_s` is the time since the
    heartbeats of the last one were missed; 0 if unknown.
    """
    if not heartbeats:
        silent = f": none has sent a heartbeat for at least {silent_s:.0f} s" if silent_s >= 1 else ""
        raise unavailable(f"no verifier is running{silent}; try again when one has started", "no_verifier")
    ours = [beat for beat in heartbeats if beat.fingerprint == fingerprint]
    if not ours:
        raise unavailable(
            f"the {len(heartbeats)} running verifiers serve another model (fingerprints "
            f"{', '.join(sorted({beat.fingerprint for beat in heartbeats}))}; needed: {fingerprint}); "
            "start gateway and verifiers with the same target and dtype",
            "wrong_model",
        )
    if all(beat.draining for beat in ours):
        raise unavailable("every verifier is shutting down; try again when another has started", "no_verifier")
    able = [beat.max_len for beat in ours if not beat.draining and set(needs) <= set(beat.features)]
    if not able:
        raise unavailable(
            f"no running verifier has the feature {', '.join(sorted(needs))}, which an option of this request needs: "
            "twins have none, nor have verifiers of an earlier version; leave the option out",
            "verifiers_too_old",
        )
    return max(able)


class Fleet:
    """The running verifiers. Concurrent requests share one read of the heartbeats."""

    def __init__(
        self,
        heartbeats: Callable[[], Awaitable[list[Heartbeat]]],
        fingerprint: str,
        probes: Mapping[str, Probe] | None = None,
        *,
        wait_s: float = 0.0,
    ) -> None:
        """`probes` check the other required services, by name; they raise BrokersError.

        `wait_s`: time after the last good read within which requests wait for the next one.
        """
        self._heartbeats = heartbeats
        self._fingerprint = fingerprint
        self._wait_s = wait_s
        self._probes: dict[str, Probe] = {**(probes or {}), "verifier": self._longest_session}
        self._good = False
        """True if a read has found a usable verifier."""
        self._bad_since_s: float | None = None
        """Time of the first read without one after that; None if there was none."""
        self._limit = 0
        self._beats: list[Heartbeat] = []
        self.arithmetics: frozenset[str] = frozenset()
        """Arithmetics of the usable verifiers of the model, at the last read; "" for an unknown one."""
        self._read_s = -FRESH_S
        self._reading: asyncio.Task[None] | None = None

    async def longest_session(self, needs: Collection[str] = ()) -> int:
        """Return the most tokens of a session that needs these features.

        Heartbeats that end may be those of a machine that stands still for a moment, so they are waited for a while.
        Raises ApiError with status 503, also when Redis is away.
        """
        while True:
            try:
                limit = await self._longest_session()
                return longest_session(self._beats, self._fingerprint, needs=needs) if needs else limit
            except ApiError as error:
                since_s = self._bad_since_s
                if error.code not in PASSING or since_s is None or monotonic() - since_s >= self._wait_s:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _longest_session(self) -> int:
        if monotonic() - self._read_s >= FRESH_S:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read())
            await asyncio.shield(self._reading)
        return self._limit

    async def follow(self) -> None:
        """Read the heartbeats regularly, for ever, so that `arithmetics` is up to date without requests."""
        while True:
            with suppress(ApiError):  # requests report it
                await self._read()
            await asyncio.sleep(FOLLOW_S)

    async def missing(self) -> dict[str, str | None]:
        """Return each required service with its problem, or None."""
        problems = await asyncio.gather(*(_problem(probe()) for probe in self._probes.values()))
        return dict(zip(self._probes, problems, strict=True))

    async def _read(self) -> None:
        try:
            beats = await self._read_heartbeats()
            self._note_arithmetics([one for one in beats if one.fingerprint == self._fingerprint and not one.draining])
            silent_s = 0.0 if self._bad_since_s is None else monotonic() - self._bad_since_s
            # Failures are not kept, so that a request sees a new verifier at once.
            self._limit, self._read_s = longest_session(beats, self._fingerprint, silent_s), monotonic()
            self._beats = beats
        except ApiError:
            if self._good and self._bad_since_s is None:
                self._bad_since_s = monotonic()
            raise
        self._good, self._bad_since_s = True, None

    async def _read_heartbeats(self) -> list[Heartbeat]:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                return await self._heartbeats()
        except BrokersError as error:
            raise unavailable(str(error), "redis_unavailable", retry_after_s=2) from error
        except TimeoutError as error:
            text = f"Redis did not answer in {READ_TIMEOUT_S:g} s"
            raise unavailable(text, "redis_unavailable", retry_after_s=2) from error

    def _note_arithmetics(self, usable: Sequence[Heartbeat]) -> None:
        """Export the verifiers by arithmetic, and log when the fleet becomes mixed or uniform again."""
        counts = Counter(beat.arithmetic for beat in usable)
        metrics.VERIFIERS.clear()
        for arithmetic, count in counts.items():
            metrics.VERIFIERS.labels(arithmetic or "unknown").set(count)
        before, self.arithmetics = distinct(sorted(self.arithmetics)), frozenset(counts)
        now = distinct(sorted(self.arithmetics))
        if now != before and len(now) > 1:
            logging.get().warning("verifiers differ in arithmetic: sessions stay within their own", arithmetics=now)
        elif now != before and len(before) > 1:
            logging.get().info("verifiers no longer differ in arithmetic", arithmetics=now)


async def _problem(check: Awaitable[object]) -> str | None:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await check
    except (BrokersError, ApiError) as error:
        return str(error)
    except TimeoutError:
        return f"no answer in {PROBE_TIMEOUT_S:g} s"
    return None
