"""What became of one request, as its client saw it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.tools.bench.load.core.requests import LoadRequest
from shared.messages import Slo

EVENT_END = b"\n\n"


class Ending(StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """With status 429."""
    ERROR = "error"
    CUT = "cut"
    """By the benchmark, which had waited long enough."""


class RequestRecord(BaseModel):
    """One request. Milliseconds count from the moment at which it was meant to be sent, so a generator that is late
    makes results worse and never better."""

    model_config = ConfigDict(frozen=True)

    session: int
    number: int
    service_class: str
    device: str
    slo: Slo | None
    """The promise that was asked for; otherwise the one that the server says it made."""
    start_s: float
    """When it was meant to be sent, since the point began."""
    lag_ms: float
    """How much later it was sent."""
    ending: Ending
    total_ms: float
    prompt_tokens: int = 0
    tokens: int = 0
    arrivals: list[tuple[float, int]] = []
    """Time and number of the tokens that came together."""
    finish: str = ""
    reason: str = ""
    """Why it was refused or failed."""
    retry_after_s: float | None = None
    summary: dict[str, Any] = {}
    rounds: list[dict[str, Any]] = []
    """As the gateway's trace tells of them."""

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token; to the end of a complete text without one."""
        if self.arrivals:
            return self.arrivals[0][0]
        return self.total_ms if self.ending is Ending.COMPLETE else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first; None for a text of fewer than two."""
        if self.tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.tokens - 1)

    @property
    def attained(self) -> bool:
        """Whether the text came to its own end within its promise; true for every complete text without one."""
        if self.ending is not Ending.COMPLETE or self.ttft_ms is None:
            return False
        if self.slo is None:
            return True
        return self.ttft_ms <= self.slo.ttft_ms and (self.tpot_ms is None or self.tpot_ms <= self.slo.tpot_ms)

    def tokens_between(self, start_s: float, end_s: float) -> int:
        """Tokens that arrived in a time since the point began."""
        return sum(count for ms, count in self.arrivals if start_s <= self.start_s + ms / 1000 < end_s)


def record_of(
    request: LoadRequest,
    events: Sequence[tuple[float, bytes]],
    *,
    start_s: float,
    lag_ms: float,
    total_ms: float,
    cut: bool = False,
    reason: str = "",
) -> RequestRecord:
    """The record of a stream: its events, each with the milliseconds at which it came.

    A server without our trace sends a token per chunk, or says in `usage` how many there were. `reason` is why the
    stream broke off.
    """
    told: dict[str, Any] = {"summary": {}, "rounds": [], "arrivals": [], "reason": reason}
    usage: Mapping[str, Any] = {}
    for ms, event in events:
        fields = _fields(event)
        if error := fields.get("error"):
            told["reason"] = str(error.get("message") or error)
            continue
        trace = fields.get("wisp") or {}
        told["summary"] |= trace.get("summary") or {}
        told["rounds"] += trace.get("rounds") or []
        usage = fields.get("usage") or usage
        for choice in fields.get("choices") or []:
            told["finish"] = choice.get("finish_reason") or told.get("finish", "")
            text = (choice.get("delta") or {}).get("content")
            if count := len(trace["tokens"]) if "tokens" in trace else int(bool(text)):
                told["arrivals"].append((round(ms, 3), count))
    if cut:
        ending = Ending.CUT
    elif told["reason"] or not told.get("finish"):
        ending = Ending.ERROR
        told["reason"] = told["reason"] or "the stream ended before its text did"
    else:
        ending = Ending.COMPLETE
    promised = told["summary"].get("slo")
    return RequestRecord(
        **_of(request, start_s, lag_ms, total_ms),
        slo=request.slo or (Slo.model_validate(promised) if promised else None),
        ending=ending,
        prompt_tokens=usage.get("prompt_tokens") or 0,
        tokens=usage.get("completion_tokens") or sum(count for _, count in told["arrivals"]),
        **told,
    )


def refusal_of(
    request: LoadRequest,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    start_s: float,
    lag_ms: float,
    total_ms: float,
) -> RequestRecord:
    """The record of a request that was answered with an error status."""
    try:
        error = json.loads(body)["error"]
        reason = f"{status} {error.get('code') or ''}: {error.get('message') or ''}"
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = f"{status}: {body[:200].decode(errors='replace')}"
    retry_after = headers.get("retry-after", "")
    return RequestRecord(
        **_of(request, start_s, lag_ms, total_ms),
        slo=request.slo,
        ending=Ending.REFUSED if status == 429 else Ending.ERROR,
        reason=reason,
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
    )


def _of(request: LoadRequest, start_s: float, lag_ms: float, total_ms: float) -> dict[str, Any]:
    return {
        "session": request.session,
        "number": request.number,
        "service_class": request.service_class,
        "device": request.device,
        "start_s": round(start_s, 4),
        "lag_ms": round(lag_ms, 3),
        "total_ms": round(total_ms, 3),
    }


def _fields(event: bytes) -> dict[str, Any]:
    """The object of a server-sent event; empty for comments and for the last event."""
    data = b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
    if not data.startswith(b"{"):
        return {}
    fields = json.loads(data)
    return fields if isinstance(fields, dict) else {}
