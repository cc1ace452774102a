"""What the times of requests say: speeds, ratios, rows of tables, sentences. Pure.

The speed of a request is its tokens over its whole time, from sending it to the end of the answer, the first token
included. Two arms of the suite give the same text, so their ratio is that of the times a user waits. A ratio of a group
is the median over its requests, each compared with the same prompt at the same temperature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.tools.training.prompts import Prompt

PLAIN = "none"
"""The suite with drafts off: what everything is compared with."""
AIM = 1.3
AIM_WORST = 0.95


@dataclass(frozen=True)
class Case:
    """One prompt at one temperature."""

    kind: str
    number: int
    """Number of the prompt among those of its kind."""
    temperature: float
    seed: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    """Prompt tokens, as the gateway tokenizes them."""

    @property
    def name(self) -> str:
        """A short description."""
        return f"{self.kind} {self.number} at temperature {self.temperature:g}"


@dataclass(frozen=True)
class TimedRequest:
    """One request that was answered."""

    case: Case
    arm: str
    delay_ms: float
    tokens: list[int]
    """Without the one that ended the text."""
    finish: str
    first_s: float
    first_tokens: int
    """Tokens that came with the first."""
    total_s: float
    summary: dict[str, float] = field(default_factory=dict)
    """The gateway's; empty for transformers."""
    agrees: int | None = None
    """Leading tokens that are those of the suite, for transformers' greedy answers."""

    @property
    def made(self) -> int:
        """Tokens that were computed, with the one that ended the text."""
        return len(self.tokens) + (self.finish == "stop")

    @property
    def speed(self) -> float:
        """Tokens per second of the whole request."""
        return self.made / self.total_s

    @property
    def later_speed(self) -> float | None:
        """Tokens per second after the first; None where all came at once."""
        later_s = self.total_s - self.first_s
        return (self.made - self.first_tokens) / later_s if self.made > self.first_tokens and later_s > 0 else None

    def record(self) -> dict[str, Any]:
        """Everything about it, for the result file."""
        return {
            "kind": self.case.kind,
            "prompt": self.case.number,
            "template": self.case.prompt.template,
            "temperature": self.case.temperature,
            "seed": self.case.seed,
            "prompt_tokens": len(self.case.prompt_ids),
            "arm": self.arm,
            "delay_ms": self.delay_ms,
            "tokens": self.made,
            "finish": self.finish,
            "first_token_ms": round(self.first_s * 1000, 3),
            "total_ms": round(self.total_s * 1000, 3),
            "tokens_per_s": round(self.speed, 3),
            "tokens_per_s_after_first": self.later_speed and round(self.later_speed, 3),
            "tokens_per_round": tokens_per_round([self]),
            "acceptance": acceptance([self]),
            "summary": self.summary,
            **({} if self.agrees is None else {"tokens_as_suite": self.agrees}),
        }


def ratios(timed: Iterable[TimedRequest], arm: str, base: str) -> dict[Case, float]:
    """How many times as fast as `base` an arm was, for each case that both answered."""
    speeds: dict[str, dict[Case, float]] = {arm: {}, base: {}}
    for one in timed:
        if one.arm in speeds:
            speeds[one.arm][one.case] = one.speed
    return {case: speed / speeds[base][case] for case, speed in speeds[arm].items() if case in speeds[base]}


def by_kind(of_case: dict[Case, float]) -> dict[str, float]:
    """The median of each kind of text."""
    kinds: dict[str, list[float]] = {}
    for case, ratio in of_case.items():
        kinds.setdefault(case.kind, []).append(ratio)
    return {kind: median(found) for kind, found in kinds.items()}


def tokens_per_round(timed: Sequence[TimedRequest]) -> float | None:
    """Tokens that one round brings, over all these requests."""
    rounds = sum(one.summary.get("rounds", 0) for one in timed)
    return sum(one.made for one in timed if one.summary) / rounds if rounds else None


def acceptance(timed: Sequence[TimedRequest]) -> float | None:
    """Share of the verified draft tokens that were accepted."""
    verified = sum(one.summary.get("verified", 0) for one in timed)
    return sum(one.summary.get("accepted", 0) for one in timed) / verified if verified else None


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def arms_table(timed: Sequence[TimedRequest], temperatures: Sequence[float]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each arm over all kinds of text."""
    columns = ["arm", "first token ms", "tokens/s", "tokens/s after first", "tokens per round", "accepted"]
    columns += [*(f"x none, T={t:g}" for t in temperatures), "x none, all"]
    rows = []
    for arm in dict.fromkeys(one.arm for one in timed):
        mine = [one for one in timed if one.arm == arm]
        compared = ratios(timed, arm, PLAIN)
        rows.append(
            [
                arm,
                median(one.first_s for one in mine) * 1000,
                median(one.speed for one in mine),
                _median(one.later_speed for one in mine if one.later_speed is not None),
                tokens_per_round(mine),
                acceptance(mine),
                *_at_each(compared, temperatures),
            ]
        )
    return columns, rows


def kinds_table(
    timed: Sequence[TimedRequest], arm: str, temperatures: Sequence[float]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: one arm against plain decoding for each kind of text."""
    columns = ["kind of text", "none tokens/s", f"{arm} tokens/s", "tokens per round", "accepted"]
    columns += [*(f"x none, T={t:g}" for t in temperatures), "x none, all", "lowest"]
    compared = ratios(timed, arm, PLAIN)
    rows = []
    for kind in dict.fromkeys(case.kind for case in compared):
        mine = [one for one in timed if one.arm == arm and one.case.kind == kind]
        here = {case: ratio for case, ratio in compared.items() if case.kind == kind}
        rows.append(
            [
                kind,
                _median(one.speed for one in timed if one.arm == PLAIN and one.case.kind == kind),
                _median(one.speed for one in mine),
                tokens_per_round(mine),
                acceptance(mine),
                *_at_each(here, temperatures),
                min(here.values()),
            ]
        )
    return columns, rows


def verdict(timed: Sequence[TimedRequest], arm: str, rivals: Sequence[str]) -> str:
    """One arm at one delay in a sentence: against plain decoding, its best and worst kind of text, its rivals."""
    compared = ratios(timed, arm, PLAIN)
    kinds = by_kind(compared)
    best, worst = max(kinds, key=kinds.__getitem__), min(kinds, key=kinds.__getitem__)
    overall = median(compared.values())
    said = (
        f"{arm}: {overall:.2f} times as fast as without drafts at the median of {len(compared)} requests "
        f"(aim: {AIM:g}{_missed(overall, AIM)}); best kind {best} {kinds[best]:.2f}, worst kind {worst} "
        f"{kinds[worst]:.2f} (aim: at least {AIM_WORST:g}{_missed(kinds[worst], AIM_WORST)})"
    )
    against = [(rival, ratios(timed, arm, rival)) for rival in rivals]
    told = [f"{median(found.values()):.2f} times {rival}" for rival, found in against if found]
    return said + (f"; against transformers, which has no network in between: {', '.join(told)}" if told else "")


def differences(timed: Iterable[TimedRequest]) -> list[str]:
    """Answers of the suite that are not the first one to the same case, token for token: there must be none."""
    first: dict[Case, TimedRequest] = {}
    found = []
    for one in timed:
        known = first.setdefault(one.case, one)
        if (known.tokens, known.finish) != (one.tokens, one.finish):
            found.append(
                f"{one.case.name}, seed {one.case.seed}: {one.arm} with {one.delay_ms:g} ms differs from {known.arm} "
                f"with {known.delay_ms:g} ms after {agreement(known.tokens, one.tokens)} tokens "
                f"({len(one.tokens)} tokens, {one.finish}; {len(known.tokens)} tokens, {known.finish})"
            )
    return found


def agreements(timed: Iterable[TimedRequest]) -> list[str]:
    """How far transformers' greedy answers are the suite's."""
    compared = [one for one in timed if one.agrees is not None]
    told = []
    for arm in dict.fromkeys(one.arm for one in compared):
        mine = [one for one in compared if one.arm == arm]
        parted = sorted(one.agrees or 0 for one in mine if (one.agrees or 0) < len(one.tokens))
        where = f"; the others part after {parted[0]} to {parted[-1]} tokens" if parted else ""
        told.append(f"{arm}: the suite's greedy text in {len(mine) - len(parted)} of {len(mine)} answers{where}")
    return told


def _at_each(compared: dict[Case, float], temperatures: Sequence[float]) -> list[float | None]:
    """Medians at each temperature, and of all."""
    each = [_median(ratio for case, ratio in compared.items() if case.temperature == t) for t in temperatures]
    return [*each, _median(compared.values())]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def _missed(ratio: float, aim: float) -> str:
    return "" if ratio >= aim else ", missed"
