"""Charges requests to the keys that they came with, and tells their holders what is left, as OpenAI does.

A request is charged before it starts: its prompts and the output that it asks for; a chat that names no limit, its
prompts alone. When it has ended, what it really used counts. So a key can pass its tokens per minute by output that no
limit was named for, and then has to wait until that is worked off: over time it keeps to its limit.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.gateway.core.keys import ApiKey, KeyLimits
from services.gateway.errors import RATE_LIMITED, ApiError, unavailable
from services.gateway.metrics import Metrics
from shared.errors import BrokersError
from shared.runtime import logging
from shared.state.quota import LEASE_MS, Allowance, Limited, Verdict

RENEW_S = LEASE_MS / 1000 / 3
SESSIONS_RETRY_S = 1


class Counters(Protocol):
    """What is needed of `shared.state.quota.Quota`."""

    async def take(self, key: str, allowance: Allowance, tokens: int, sessions: Sequence[str]) -> Verdict:
        """See there."""

    async def join(self, key: str, allowance: Allowance, sessions: Sequence[str]) -> Verdict:
        """See there."""

    async def settle(self, key: str, allowance: Allowance, unused: int, sessions: Sequence[str]) -> None:
        """See there."""

    async def renew(self, running: dict[str, list[str]]) -> None:
        """See there."""


@dataclass
class Charge:
    """One request's part of its key's allowance."""

    headers: dict[str, str] = field(default_factory=dict)
    used: int = 0
    """Tokens that it has really used, to be told before the end."""


class Ledger:
    """What runs for which key at this gateway."""

    def __init__(self, counters: Counters | None, defaults: KeyLimits, metrics: Metrics) -> None:
        """counters: None where no keys are asked for. defaults: the limits of keys that have none of their own."""
        self._counters = counters
        self._defaults = defaults
        self._metrics = metrics
        self._running: dict[str, set[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def charge(
        self, key: ApiKey | None, sessions: Sequence[str], tokens: int, *, resumed: bool = False
    ) -> AsyncIterator[Charge]:
        """Charge a request for its sessions and tokens while the context lasts; None is charged nothing.

        resumed: it counts as a request already, and is charged only for its sessions, and at the end for what it used.
        Raises ApiError: 429 when a limit is reached, 503 when Redis is away.
        """
        allowance = Allowance() if key is None else self._allowance(key)
        counters = self._counters
        if key is None or counters is None or not allowance.limited:
            yield Charge()
            return
        try:
            if resumed:
                verdict = await counters.join(key.id, allowance, sessions)
            else:
                verdict = await counters.take(key.id, allowance, tokens, sessions)
        except BrokersError as error:
            raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error
        headers = headers_of(allowance, verdict)
        if verdict.refused is not None:
            logging.get().info("request refused", code=RATE_LIMITED, limit=verdict.refused.value)
            self._metrics.limited.labels(verdict.refused.value).inc()
            raise refusal(key, allowance, verdict, verdict.refused, tokens, headers)
        charge = Charge(headers)
        running = self._running.setdefault(key.id, set())
        running.update(sessions)
        try:
            yield charge
        finally:
            running.difference_update(sessions)
            # Beside the request: its client may have gone, and its task with it.
            self._spawn(self._settle(counters, key.id, allowance, tokens - charge.used, sessions))

    async def renew(self) -> None:
        """Keep the leases of what runs here, for ever."""
        while True:
            await asyncio.sleep(RENEW_S)
            running = {key: sorted(sessions) for key, sessions in self._running.items() if sessions}
            self._running = {key: self._running[key] for key in running}
            if not running or self._counters is None:
                continue
            try:
                await self._counters.renew(running)
            except BrokersError as error:
                logging.get().warning("leases not renewed", error=str(error))

    async def settled(self) -> None:
        """Wait until what has ended is settled."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    def _allowance(self, key: ApiKey) -> Allowance:
        own, defaults = key, self._defaults
        return Allowance(
            own.requests_per_minute or defaults.requests_per_minute,
            own.tokens_per_minute or defaults.tokens_per_minute,
            own.max_sessions or defaults.max_sessions,
        )

    async def _settle(
        self, counters: Counters, key: str, allowance: Allowance, unused: int, sessions: Sequence[str]
    ) -> None:
        try:
            await counters.settle(key, allowance, unused, sessions)
        except BrokersError as error:
            logging.get().warning("usage not settled: the key was charged what it asked for", error=str(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def headers_of(allowance: Allowance, verdict: Verdict) -> dict[str, str]:
    """OpenAI's x-ratelimit headers, for the limits that there are."""
    headers = {}
    for kind, limit, left, reset_ms in (
        ("requests", allowance.requests_per_minute, verdict.requests_left, verdict.requests_reset_ms),
        ("tokens", allowance.tokens_per_minute, verdict.tokens_left, verdict.tokens_reset_ms),
    ):
        if limit is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, left))
            headers[f"x-ratelimit-reset-{kind}"] = duration(reset_ms)
    return headers


def duration(ms: int) -> str:
    """A duration as OpenAI writes it: 0s, 120ms, 1.5s, 6m0s."""
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{minutes}m{math.ceil(rest / 1000)}s" if minutes else f"{rest / 1000:g}s"


def refusal(
    key: ApiKey, allowance: Allowance, verdict: Verdict, limited: Limited, tokens: int, headers: dict[str, str]
) -> ApiError:
    """The 429 of a request that passes a limit of its key."""
    whose = f"Rate limit reached for key {key.name!r}"
    wait = f"Please try again in {duration(verdict.wait_ms)}."
    seconds = max(1, math.ceil(verdict.wait_ms / 1000))
    extra = headers | {"retry-after-ms": str(verdict.wait_ms)}
    if limited is Limited.REQUESTS:
        text = f"{whose} on requests per min: Limit {allowance.requests_per_minute}. {wait}"
    elif limited is Limited.TOKENS:
        text = (
            f"{whose} on tokens per min: Limit {allowance.tokens_per_minute}, Left {verdict.tokens_left}, "
            f"Requested {tokens}. {wait}"
        )
    elif limited is Limited.SESSIONS:
        text = f"{whose} on texts at once: Limit {allowance.max_sessions}. Please try again when one has ended."
        seconds, extra = SESSIONS_RETRY_S, headers
    else:
        text = (
            f"Request too large for key {key.name!r} on tokens per min: Limit {allowance.tokens_per_minute}, "
            f"Requested {tokens}. The prompt or the output tokens that are asked for must be reduced."
        )
        return _limited(text, "tokens", None, headers | {"x-should-retry": "false"})
    return _limited(text, limited.value, seconds, extra)


def _limited(text: str, kind: str, retry_after_s: int | None, extra: dict[str, str]) -> ApiError:
    return ApiError(429, text, code=RATE_LIMITED, kind=kind, retry_after_s=retry_after_s, extra=extra)
