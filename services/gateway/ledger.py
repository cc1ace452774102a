"""Charging of requests to their API keys, and OpenAI's rate-limit headers.

A request is charged before it starts: its prompts and the requested output tokens; for a chat without a token limit,
its prompts alone. When it ends, the tokens that it really used count. A key can therefore exceed its tokens per minute
by output without a limit, and then has to wait until that is worked off. Over time it keeps its limit.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.errors import RATE_LIMITED, ApiError, unavailable
from services.gateway.keys import ApiKey
from services.gateway.metrics import LIMITED
from services.gateway.settings import KeyLimits
from shared.errors import BrokersError
from shared.runtime import logging
from shared.runtime.service import BackgroundTasks
from shared.state.quota import LEASE_MS, Allowance, Limited, QuotaVerdict

RENEW_S = LEASE_MS / 1000 / 3
SESSIONS_RETRY_S = 1
SETTLE_S = 5.0
"""Time for settling at the end."""


class Counters(Protocol):
    """The part of `shared.state.quota.Quota` that a ledger needs. Every method raises BrokersError."""

    async def take(self, key: str, allowance: Allowance, tokens: int, session_ids: Sequence[str]) -> QuotaVerdict:
        """Charge a request's tokens and sessions, or report the limit that it exceeds."""

    async def join(self, key: str, allowance: Allowance, session_ids: Sequence[str]) -> QuotaVerdict:
        """Charge the sessions of a resumed request."""

    async def settle(self, key: str, allowance: Allowance, unused: int, session_ids: Sequence[str]) -> None:
        """Release the sessions and return unused tokens."""

    async def renew(self, running: dict[str, list[str]]) -> None:
        """Renew the leases of running sessions, by key."""


@dataclass
class Charge:
    """One request's share of its key's allowance."""

    headers: dict[str, str] = field(default_factory=dict)
    used: int = 0
    """Tokens that the request used; to be set before the context ends."""


class Ledger:
    """The running sessions of this gateway by key."""

    def __init__(self, counters: Counters | None = None, defaults: KeyLimits | None = None) -> None:
        """`counters` is None where nothing is charged; `defaults` limit the keys without limits of their own."""
        self._counters = counters
        self._defaults = defaults or KeyLimits()
        self._running: dict[str, set[str]] = {}
        self._tasks = BackgroundTasks()

    @asynccontextmanager
    async def charge(
        self, key: ApiKey, session_ids: Sequence[str], tokens: int, *, resumed: bool = False
    ) -> AsyncIterator[Charge]:
        """Charge a key for a request's sessions and tokens during the context.

        A resumed request has been counted before: it is charged for its sessions, and at the end for the tokens used.
        Raises ApiError: 429 when a limit is reached, 503 when Redis is away.
        """
        allowance = self._allowance(key)
        counters = self._counters
        if counters is None or not allowance.limited:
            yield Charge()
            return
        try:
            if resumed:
                verdict = await counters.join(key.id, allowance, session_ids)
            else:
                verdict = await counters.take(key.id, allowance, tokens, session_ids)
        except BrokersError as error:
            raise unavailable(str(error), "brokers_unavailable", retry_after_s=2) from error
        headers = headers_of(allowance, verdict)
        if verdict.refused is not None:
            logging.get().info("request refused", code=RATE_LIMITED, limit=verdict.refused.value)
            LIMITED.labels(verdict.refused.value).inc()
            raise refusal(key, allowance, verdict, verdict.refused, tokens, headers)
        charge = Charge(headers)
        running = self._running.setdefault(key.id, set())
        running.update(session_ids)
        try:
            yield charge
        finally:
            running.difference_update(session_ids)
            # In a task of its own, because the request's task may be cancelled with its client gone.
            self._tasks.spawn(self._settle(counters, key.id, allowance, tokens - charge.used, session_ids))

    async def renew(self) -> None:
        """Renew the leases of the running sessions, for ever."""
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
        """Wait until the ended requests are settled."""
        await self._tasks.ended(SETTLE_S)

    def _allowance(self, key: ApiKey) -> Allowance:
        own, defaults = key, self._defaults
        return Allowance(
            own.requests_per_minute or defaults.requests_per_minute,
            own.tokens_per_minute or defaults.tokens_per_minute,
            own.max_sessions or defaults.max_sessions,
        )

    async def _settle(
        self, counters: Counters, key: str, allowance: Allowance, unused: int, session_ids: Sequence[str]
    ) -> None:
        try:
            await counters.settle(key, allowance, unused, session_ids)
        except BrokersError as error:
            logging.get().warning("usage not settled; the key stays charged for the requested tokens", error=str(error))


def headers_of(allowance: Allowance, verdict: QuotaVerdict) -> dict[str, str]:
    """Return OpenAI's x-ratelimit headers for the limits of the allowance."""
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
    """Format a duration as OpenAI does: 0s, 120ms, 1.5s, 6m0s."""
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{minutes}m{math.ceil(rest / 1000)}s" if minutes else f"{rest / 1000:g}s"


def refusal(
    key: ApiKey, allowance: Allowance, verdict: QuotaVerdict, limited: Limited, tokens: int, headers: dict[str, str]
) -> ApiError:
    """Return the 429 of a request that exceeds a limit of its key."""
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
        text = f"{whose} on concurrent completions: Limit {allowance.max_sessions}. Please try again when one ends."
        seconds, extra = SESSIONS_RETRY_S, headers
    else:
        text = (
            f"Request too large for key {key.name!r} on tokens per min: Limit {allowance.tokens_per_minute}, "
            f"Requested {tokens}. The prompt or the requested output tokens must be reduced."
        )
        return _limited(text, "tokens", None, headers | {"x-should-retry": "false"})
    return _limited(text, limited.value, seconds, extra)


def _limited(text: str, kind: str, retry_after_s: int | None, extra: dict[str, str]) -> ApiError:
    return ApiError(429, text, code=RATE_LIMITED, kind=kind, retry_after_s=retry_after_s, extra=extra)
