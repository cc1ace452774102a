"""Service classes, the SLO of a request, and whether a completion attained it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from services.gateway.errors import invalid
from shared.errors import quoted
from shared.messages import DEFAULT_CLASS, LONGEST_MS, SHORTEST_MS, Slo
from shared.slo import Promise

TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")


class ServiceClass(Promise):
    """The SLO that a class's requests ask for, and the load up to which they are admitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    admit_to: Annotated[float, Field(gt=0, le=10)] = 0.9
    """Promised share of the verifiers' time up to which the SLO is promised to more requests; above 1, more is promised
    than can be kept. It is also the share of the gateway's longest backlog at which any request of the class is
    refused."""
    max_sessions: Annotated[int, Field(ge=1)] | None = None
    """Most running completions of the class; None for no limit of its own."""


def class_of(tier: str | None, classes: Mapping[str, ServiceClass]) -> str:
    """Return the class named by a `service_tier`; the default class for None and for unknown names such as `auto`."""
    return tier if tier is not None and tier in classes else DEFAULT_CLASS


def slo_of(headers: Mapping[str, str], tier: str | None, classes: Mapping[str, ServiceClass]) -> Slo | None:
    """Return the SLO that the request asks for; None for best effort.

    A request asks for one by naming a class that has one, or by a header, which overrides the class. With only one of
    the two headers, the class completes the SLO; a class without a promise is completed from the default class. Raises
    ApiError.
    """
    own = classes[tier].slo if tier is not None and tier in classes else None
    ttft_ms = _milliseconds(headers, TTFT_HEADERS)
    tpot_ms = _milliseconds(headers, TPOT_HEADERS)
    if ttft_ms is None and tpot_ms is None:
        return own
    base = own or classes[DEFAULT_CLASS].slo
    assert base is not None  # the settings refuse a default class without a promise
    return Slo(
        ttft_ms=base.ttft_ms if ttft_ms is None else ttft_ms, tpot_ms=base.tpot_ms if tpot_ms is None else tpot_ms
    )


def _milliseconds(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    for name in names:
        if (text := headers.get(name)) is None:
            continue
        try:
            value = math.nan if "_" in text else float(text)
        except ValueError:
            value = math.nan
        if not SHORTEST_MS <= value <= LONGEST_MS:
            limits = f"{SHORTEST_MS:g} to {LONGEST_MS:.0f}"
            raise invalid(f"header {name} must be a number of milliseconds, {limits}, not {quoted(text)}", param=name)
        return value
    return None


@dataclass(frozen=True)
class SloOutcome:
    """Speed of a completion, and whether it attained its SLO."""

    ttft_ms: float | None
    """Time to the first token; to the end, for a complete completion without tokens."""
    tpot_ms: float | None
    """Mean time per output token after the first; None with fewer than two tokens."""
    attained: bool
    """True if the completion is complete and within its SLO; true for every complete one without an SLO."""


def judge(slo: Slo | None, complete: bool, tokens: int, first_ms: float | None, total_ms: float) -> SloOutcome:
    """Compare a completion of `tokens` tokens with its SLO; times count from the request's arrival.

    `complete` means that it ended with an end-of-text token, a stop string or its token limit.
    """
    ttft_ms = total_ms if complete and first_ms is None else first_ms
    tpot_ms = None if first_ms is None or tokens < 2 else (total_ms - first_ms) / (tokens - 1)
    kept = slo is None or (
        ttft_ms is not None and ttft_ms <= slo.ttft_ms and (tpot_ms is None or tpot_ms <= slo.tpot_ms)
    )
    return SloOutcome(ttft_ms, tpot_ms, complete and kept)
