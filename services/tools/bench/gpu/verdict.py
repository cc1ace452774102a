"""Sentences about the results of `wisp bench gpu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from services.tools.bench.gpu.runner import StepOutcome
from services.tools.bench.load.core.search import capacity, pooled

LACKING: Final = (
    "bits on a GPU, CUDA graphs, texts under load on a GPU, speeds and shares of its bandwidth, products against "
    "cuBLAS, transformers on a GPU, cost models of a GPU, capacities with a target on a GPU"
)
"""Results that need a GPU."""
VERIFY_AIM, BANDWIDTH_AIM = 1.1, 80.0
COMPARED_SESSIONS: Final = 32
CAPACITY_AIM: Final = 0.95
"""Share of requests that attain at the capacity."""

Rows = Mapping[str, Sequence[Sequence[Any]]]


def verdicts(rows: Rows, outcomes: Sequence[StepOutcome], *, tiny: bool) -> list[str]:
    """Return what the rows show, with the aims, and what is missing."""
    found = [*_exactness(rows["exactness"]), *_texts(rows["texts"])]
    if tiny:
        found.append(f"In Triton's interpreter: the times mean nothing. Not run for lack of a GPU: {LACKING}.")
    else:
        found += _speeds(rows["speed"])
    found += _capacities(rows.get("suite", ()))
    if missing := [f"{one.name} ({one.outcome})" for one in outcomes if one.outcome != "done"]:
        found.append(f"Incomplete: {', '.join(missing)}.")
    return found


def _exactness(rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return ["Exactness was not measured."]
    positions, differing = sum(row[3] for row in rows), sum(row[4] for row in rows)
    if differing:
        return [f"NOT exact here: {differing} of {positions} positions have other bits than one prefill."]
    return [f"All {positions} positions have the bits of one prefill."]


def _texts(rows: Sequence[Sequence[Any]]) -> list[str]:
    found = []
    for model, count, tokens, differing, states in rows:
        if differing or states:
            found.append(
                f"NOT exact here: of {count} texts of {model}, {differing} differ under load, {states} in states."
            )
        else:
            found.append(f"{count} texts of {model} ({tokens} tokens) are the same under load, with all their states.")
    return found


def _speeds(rows: Sequence[Sequence[Any]]) -> list[str]:
    found = []
    for model in dict.fromkeys(row[0] for row in rows):
        times = {(row[1], row[3]): row[4] for row in rows if row[0] == model}
        decode, verify = times.get((COMPARED_SESSIONS, 1)), times.get((COMPARED_SESSIONS, 5))
        if decode and verify:
            ratio = verify / decode
            found.append(
                f"{model}: verifying 5 tokens of {COMPARED_SESSIONS} sessions takes {ratio:.2f} times as long as "
                f"decoding one (aim {VERIFY_AIM})."
            )
        shares = [row[7] for row in rows if row[0] == model and row[3] == 1]
        if shares:
            found.append(
                f"{model}: decoding reaches {max(shares):.0f} % of the bandwidth of a copy (aim {BANDWIDTH_AIM:.0f} %)."
            )
    return found


def _capacities(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the capacity of each arm: the most sessions of which 95 % of the requests attain."""
    found = []
    for model, arm in dict.fromkeys((row[0], row[1]) for row in rows):
        tried = pooled((row[2], row[3], row[4]) for row in rows if row[:2] == [model, arm])
        most = capacity(tried, CAPACITY_AIM)
        above = f"{most.failing} fail" if most.failing else "none that was tried fails"
        found.append(f"{model}, {arm}: {most.sessions} sessions hold {100 * CAPACITY_AIM:.0f} % ({above}).")
    return found
