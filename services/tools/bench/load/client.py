"""The HTTP client of the load generator: it sends a request and takes the time of each event of its stream.

It uses httpx instead of the `openai` client: 170 instead of 270 microseconds of CPU time for each chunk, and the
generator shares the cores with the server that it measures. Events are parsed after the end of the stream, in
`core.record`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from services.drafter.core.profile import LinkDelays, LinkProfile
from services.tools.bench.load.core.record import EVENT_END, RequestRecord, record_of, refusal_of
from services.tools.bench.load.core.requests import LoadRequest
from services.tools.local.settings import LocalSettings
from shared.errors import WispError

CONNECT_S = 10.0
SILENCE_S = 120.0
"""A stream that is silent for this long has failed."""


class ServerUnusable(WispError):
    """The server under load does not answer as an OpenAI server does."""


@dataclass
class LoadClient:
    """A server under load. Times are seconds of `time.perf_counter`."""

    http: httpx.AsyncClient
    model: str
    pools: bool
    """True to name the drafter pool of its hardware in each request."""
    uplinks: Mapping[str, LinkProfile] = field(default_factory=dict)
    """Uplink by hardware profile: a request waits for its travel time before it is sent."""

    @classmethod
    async def connect(
        cls, http: httpx.AsyncClient, *, pools: bool, uplinks: Mapping[str, LinkProfile] | None = None
    ) -> LoadClient:
        """Return a client for the server's model. Raises ServerUnusable."""
        try:
            answer = await http.get("models")
            return cls(http, str(answer.raise_for_status().json()["data"][0]["id"]), pools, uplinks or {})
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ServerUnusable(
                f"{http.base_url}models does not list a model ({error or type(error).__name__}); "
                "give the base URL of an OpenAI server, ending in /v1, and its key in WISP_API_KEY"
            ) from error

    async def ask(self, request: LoadRequest, began_s: float, due_s: float) -> RequestRecord:
        """Send a request that was due at `due_s` in a point that began at `began_s`; return its record at the end.

        Cancellation does not raise: it ends the stream, and the record has the ending `cut`.
        """
        sent_s = time.perf_counter()
        timed = {"start_s": due_s - began_s, "lag_ms": (sent_s - due_s) * 1000}
        events: list[tuple[float, bytes]] = []
        cut, reason = False, ""
        try:
            if (uplink := self.uplinks.get(request.device)) is not None:
                way = LinkDelays(uplink, f"{request.session}/{request.number}")
                await asyncio.sleep(way.arrival_ms(0.0) / 1000)
            async with self.http.stream(
                "POST", "chat/completions", json=self._body(request), headers=_headers(request)
            ) as answer:
                if answer.status_code != 200:
                    body = await answer.aread()
                    total_ms = (time.perf_counter() - due_s) * 1000
                    return refusal_of(request, answer.status_code, answer.headers, body, total_ms=total_ms, **timed)
                rest = b""
                async for part in answer.aiter_bytes():
                    *whole, rest = (rest + part).replace(b"\r\n", b"\n").split(EVENT_END)
                    ms = (time.perf_counter() - due_s) * 1000
                    events += [(ms, event) for event in whole]
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            cut = True
        total_ms = (time.perf_counter() - due_s) * 1000
        return record_of(request, events, total_ms=total_ms, cut=cut, reason=reason, **timed)

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "max_completion_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "wisp": {
                "trace": True,
                **({"pool": request.device} if self.pools and request.device else {}),
                **({"draft": request.draft} if request.draft else {}),
            },
        }
        if request.ignore_eos:
            body["ignore_eos"] = True
        if request.tier is not None:
            body["service_tier"] = request.tier
        return body


def http_client(url: str) -> httpx.AsyncClient:
    """Return an HTTP client without a limit on connections, with the key in WISP_API_KEY or OPENAI_API_KEY.

    Use it as a context manager.
    """
    return httpx.AsyncClient(
        base_url=url.rstrip("/") + "/",
        headers={"authorization": f"Bearer {LocalSettings().api_key.get_secret_value()}"},
        timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


def _headers(request: LoadRequest) -> dict[str, str]:
    if request.slo is None:
        return {}
    return {"x-slo-ttft-ms": f"{request.slo.ttft_ms:g}", "x-slo-tpot-ms": f"{request.slo.tpot_ms:g}"}
