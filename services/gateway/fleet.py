"""Which verifiers are there, as their heartbeats in Redis say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

from services.gateway.errors import unavailable
from shared.errors import BrokersError
from shared.messages import Heartbeat

FRESH_S = 1.0
"""How long the last look at the heartbeats is good for."""
LOOK_S = 3.0
"""How long Redis may take to answer."""


def longest_session(heartbeats: Sequence[Heartbeat], fingerprint: str) -> int:
    """Most tokens of a session that some verifier can take now.

    Raises ApiError with status 503 that says why there is none.
    """
    if not heartbeats:
        raise unavailable("no verifier is running; try again when one has started", "no_verifier")
    ours = [beat for beat in heartbeats if beat.fingerprint == fingerprint]
    if not ours:
        raise unavailable(
            f"the {len(heartbeats)} verifiers that are running serve another model (fingerprints "
            f"{', '.join(sorted({beat.fingerprint for beat in heartbeats}))}; needed: {fingerprint}); "
            "start gateway and verifiers with the same target and dtype",
            "wrong_model",
        )
    if all(beat.draining for beat in ours):
        raise unavailable("every verifier is shutting down; try again when another has started", "no_verifier")
    return max(beat.max_len for beat in ours if not beat.draining)


class Fleet:
    """The verifiers as last seen; looks again when that is too long ago, once for all who wait."""

    def __init__(self, heartbeats: Callable[[], Awaitable[list[Heartbeat]]], fingerprint: str) -> None:
        self._heartbeats = heartbeats
        self._fingerprint = fingerprint
        self._limit = 0
        self._seen_s = -FRESH_S
        self._looking: asyncio.Task[None] | None = None

    async def longest_session(self) -> int:
        """As the function of that name. Raises ApiError with status 503, also when Redis is away."""
        if monotonic() - self._seen_s >= FRESH_S:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)
        return self._limit

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S):
                beats = await self._heartbeats()
        except BrokersError as error:
            raise unavailable(str(error), "redis_unavailable", retry_after_s=2) from error
        except TimeoutError as error:
            raise unavailable(f"Redis did not answer in {LOOK_S:g} s", "redis_unavailable", retry_after_s=2) from error
        # Only what was found is kept: who waits for a verifier to start is not told an old answer.
        self._limit, self._seen_s = longest_session(beats, self._fingerprint), monotonic()
