"""Which speed a request is promised: by its headers, else by its service tier's class."""

from __future__ import annotations

import math
from collections.abc import Mapping

from services.gateway.errors import invalid
from shared.messages import DEFAULT_CLASS, Slo

TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")


def slo_of(headers: Mapping[str, str], tier: str | None, classes: Mapping[str, Slo | None]) -> Slo | None:
    """The request's SLO; None where its class promises nothing.

    A header goes before the class. Where only one of the two is given, the class completes it; a class without a
    promise is completed from the default class. Unknown tiers are served as the default one. Raises ApiError.
    """
    default = classes[DEFAULT_CLASS]
    own = classes.get(tier, default) if tier is not None else default
    ttft_ms = _milliseconds(headers, TTFT_HEADERS)
    tpot_ms = _milliseconds(headers, TPOT_HEADERS)
    if ttft_ms is None and tpot_ms is None:
        return own
    base = own or default
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
        if not 0 < value < math.inf:
            raise invalid(f"header {name} must be a positive number of milliseconds, not {text[:60]!r}", param=name)
        return value
    return None
