"""The record of one request, as its client saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from services.tools.bench.load.core.requests import LoadRequest
from shared.messages import Slo
from shared.slo import is_within

EVENT_END = b"\n\n"


class Ending(StrEnum):
    """The ending of a request."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """By status 429."""
    ERROR = "error"
    CUT = "cut"
    """By the benchmark, at the end of the drain."""


class RequestRecord(BaseModel):
    """One request. Milliseconds count from the time at which it was due, so a late generator never improves results."""

    model_config = ConfigDict(frozen=True)

    session: int
    number: int
    service_class: str
    device: str
    slo: Slo | None
    """The requested SLO; without one, the SLO that the server reports."""
    start_s: float
    """Time at which it was due, since the start of the point."""
    lag_ms: float
    """Time from then until it was sent."""
    ending: Ending
    total_ms: float
    prompt_tokens: int = 0
    tokens: int = 0
    arrivals: list[tuple[float, int]] = []
    """Time and number of tokens of each event with tokens."""
    finish: str = ""
    reason: str = ""
    """Reason of a refusal or failure."""
    retry_after_s: float | None = None
    summary: dict[str, Any] = {}
    rounds: list[dict[str, Any]] = []
    """Rounds of the gateway's trace."""

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token, or to the end of a complete answer without tokens."""
        if self.arrivals:
            return self.arrivals[0][0]
        return self.total_ms if self.ending is Ending.COMPLETE else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        if self.tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.tokens - 1)

    @property
    def attained(self) -> bool:
        """True if the answer is complete and met its SLO, if it has one."""
        return self.ending is Ending.COMPLETE and is_within(self.slo, self.ttft_ms, self.tpot_ms)

    def tokens_between(self, start_s: float, end_s: float) -> int:
        """Return the number of tokens that arrived from `start_s` to `end_s`, since the start of the point."""
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
    """Return the record of a stream, from its events with their arrival times in milliseconds.

    Without our trace, a chunk counts as one token, and `usage` overrides the sum. reason: why the stream broke off.
    """
    parsed: dict[str, Any] = {"summary": {}, "rounds": [], "arrivals": [], "finish": "", "reason": reason}
    usage: Mapping[str, Any] = {}
    for ms, event in events:
        fields = _fields(event)
        usage = fields.get("usage") or usage
        _add_event(parsed, ms, fields)
    if cut:
        ending = Ending.CUT
    elif parsed["reason"] or not parsed["finish"]:
        ending = Ending.ERROR
        parsed["reason"] = parsed["reason"] or "the stream ended without a finish reason"
    else:
        ending = Ending.COMPLETE
    slo = parsed["summary"].get("slo")
    return RequestRecord(
        **_of(request, start_s, lag_ms, total_ms),
        slo=request.slo or (Slo.model_validate(slo) if slo else None),
        ending=ending,
        prompt_tokens=usage.get("prompt_tokens") or 0,
        tokens=usage.get("completion_tokens") or sum(count for _, count in parsed["arrivals"]),
        **parsed,
    )


def _add_event(parsed: dict[str, Any], ms: float, fields: Mapping[str, Any]) -> None:
    if error := fields.get("error"):
        parsed["reason"] = str(error.get("message") or error)
        return
    trace = fields.get("wisp") or {}
    parsed["summary"] |= trace.get("summary") or {}
    parsed["rounds"] += trace.get("rounds") or []
    for choice in fields.get("choices") or []:
        parsed["finish"] = choice.get("finish_reason") or parsed["finish"]
        text = (choice.get("delta") or {}).get("content")
        if count := len(trace["tokens"]) if "tokens" in trace else int(bool(text)):
            parsed["arrivals"].append((round(ms, 3), count))


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
    """Return the record of a request with an error status."""
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
    """Return the object of a server-sent event; empty for comments and for the last event."""
    data = b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
    if not data.startswith(b"{"):
        return {}
    fields = json.loads(data)
    return fields if isinstance(fields, dict) else {}
