"""Service classes, which speed a request is promised, and whether the promise was kept. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from services.gateway.errors import invalid
from shared.messages import DEFAULT_CLASS, LONGEST_MS, SHORTEST_MS, Slo
from shared.slo import Promise

TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")


class ServiceClass(Promise):
    """What requests of a class are promised, and how far they are taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    admit_to: Annotated[float, Field(gt=0, le=10)] = 0.9
    """Share of the verifiers' time promised to sessions up to which requests of the class are taken; above 1,
    more is promised than can be kept."""
    max_sessions: Annotated[int, Field(ge=1)] | None = None
    """Texts of the class generated at once; None for no limit of its own."""


def class_of(tier: str | None, classes: Mapping[str, ServiceClass]) -> str:
    """The class that a `service_tier` names; the default one for none and for unknown ones, `auto` among them."""
    return tier if tier is not None and tier in classes else DEFAULT_CLASS


def slo_of(headers: Mapping[str, str], tier: str | None, classes: Mapping[str, ServiceClass]) -> Slo | None:
    """The request's SLO; None where its class promises nothing.

    A header goes before the class. Where only one of the two is given, the class completes it; a class without a
    promise is completed from the default class. Raises ApiError.
    """
    own = classes[class_of(tier, classes)].slo
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
            raise invalid(f"header {name} must be a number of milliseconds, {limits}, not {text[:60]!r}", param=name)
        return value
    return None


@dataclass(frozen=True)
class Outcome:
    """How fast a text came."""

    ttft_ms: float | None
    """Time to its first token; to its end, if it came to its own end without one."""
    tpot_ms: float | None
    """Mean time per output token after the first; None for a text of fewer than two."""
    attained: bool
    """Whether it came to its own end within its SLO; true for every complete text without one."""


def judge(slo: Slo | None, complete: bool, tokens: int, first_ms: float | None, total_ms: float) -> Outcome:
    """What became of a text of so many tokens; times since the request came in.

    `complete` says that it came to its own end: an end-of-text token, a stop string, or its limit of tokens.
    """
    ttft_ms = total_ms if complete and first_ms is None else first_ms
    tpot_ms = None if first_ms is None or tokens < 2 else (total_ms - first_ms) / (tokens - 1)
    kept = slo is None or (
        ttft_ms is not None and ttft_ms <= slo.ttft_ms and (tpot_ms is None or tpot_ms <= slo.tpot_ms)
    )
    return Outcome(ttft_ms, tpot_ms, complete and kept)
