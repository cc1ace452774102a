"""Speeds, ratios, tables and sentences from the times of requests.

The speed of a request is its tokens over its whole time, from sending it to the end of the answer, the first token
included. All arms of the suite give the same completion, so the ratio of speeds is the ratio of the times that a user
waits. The ratio of a group is the median over its requests, each compared with the same prompt at the same temperature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.tools.training.prompts import CorpusPrompt

PLAIN = "none"
"""The suite without drafts: the base of all ratios."""
ENGINE = "engine"
"""The engine in the benchmark's process, without the suite."""
AIM = 1.3
"""Lowest ratio to plain decoding, over all requests."""
AIM_WORST = 0.95
"""Lowest ratio to plain decoding of a kind of text."""
AIM_PLAIN = 0.97
"""Lowest ratio of plain decoding to the engine alone."""


@dataclass(frozen=True)
class Case:
    """One prompt at one temperature."""

    kind: str
    number: int
    """Number of the prompt among those of its kind."""
    temperature: float
    seed: int
    prompt: CorpusPrompt
    prompt_ids: tuple[int, ...]
    """Prompt tokens, as the gateway tokenizes them."""

    @property
    def name(self) -> str:
        """A short description."""
        return f"{self.kind} {self.number} at temperature {self.temperature:g}"


@dataclass(frozen=True)
class TimedRequest:
    """One answered request."""

    case: Case
    arm: str
    delay_ms: float
    tokens: list[int]
    """Output tokens, without the stop token."""
    finish: str
    first_s: float
    first_tokens: int
    """Tokens that arrived together with the first one."""
    total_s: float
    summary: dict[str, float] = field(default_factory=dict)
    """The gateway's summary; empty for models in this process."""
    agrees: int | None = None
    """Length of the prefix that equals the suite's completion, for answers of other models that may be the same."""

    @property
    def made(self) -> int:
        """Number of generated tokens, the stop token included."""
        return len(self.tokens) + (self.finish == "stop")

    @property
    def speed(self) -> float:
        """Tokens per second of the whole request."""
        return self.made / self.total_s

    @property
    def later_speed(self) -> float | None:
        """Tokens per second after the first; None if all arrived at once."""
        later_s = self.total_s - self.first_s
        return (self.made - self.first_tokens) / later_s if self.made > self.first_tokens and later_s > 0 else None

    def record(self) -> dict[str, Any]:
        """Return the request for the result file."""
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
    """Return the speed of an arm divided by that of `base`, for each case that both answered."""
    speeds: dict[str, dict[Case, float]] = {arm: {}, base: {}}
    for one in timed:
        if one.arm in speeds:
            speeds[one.arm][one.case] = one.speed
    return {case: speed / speeds[base][case] for case, speed in speeds[arm].items() if case in speeds[base]}


def by_kind(of_case: dict[Case, float]) -> dict[str, float]:
    """Return the median ratio of each kind of text."""
    kinds: dict[str, list[float]] = {}
    for case, ratio in of_case.items():
        kinds.setdefault(case.kind, []).append(ratio)
    return {kind: median(found) for kind, found in kinds.items()}


def tokens_per_round(timed: Sequence[TimedRequest]) -> float | None:
    """Return the mean tokens of a round, over all requests with a summary."""
    rounds = sum(one.summary.get("rounds", 0) for one in timed)
    made = sum(one.made - one.summary.get("run_tokens", 0) for one in timed if one.summary)
    return made / rounds if rounds else None


def acceptance(timed: Sequence[TimedRequest]) -> float | None:
    """Return the accepted share of the verified draft tokens."""
    verified = sum(one.summary.get("verified", 0) for one in timed)
    return sum(one.summary.get("accepted", 0) for one in timed) / verified if verified else None


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def arms_table(timed: Sequence[TimedRequest], temperatures: Sequence[float]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows: each arm over all kinds of text."""
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
    """Return columns and rows: one arm against plain decoding, by kind of text."""
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
    """Compare an arm in a sentence: with plain decoding, over all requests and by kind of text, and with its rivals."""
    compared = ratios(timed, arm, PLAIN)
    kinds = by_kind(compared)
    best, worst = max(kinds, key=kinds.__getitem__), min(kinds, key=kinds.__getitem__)
    overall = median(compared.values())
    sentence = (
        f"{arm}: {overall:.2f} times as fast as without drafts at the median of {len(compared)} requests "
        f"(aim: {AIM:g}{_missed(overall, AIM)}); best kind {best} {kinds[best]:.2f}, worst kind {worst} "
        f"{kinds[worst]:.2f} (aim: at least {AIM_WORST:g}{_missed(kinds[worst], AIM_WORST)})"
    )
    against = [(rival, ratios(timed, arm, rival)) for rival in rivals]
    compared_with = [f"{median(found.values()):.2f} times {rival}" for rival, found in against if found]
    if compared_with:
        sentence += f"; against models in one process, without a network: {', '.join(compared_with)}"
    return sentence


def plain_verdict(timed: Sequence[TimedRequest]) -> str | None:
    """Compare plain decoding through the suite with the engine alone, in a sentence; None if it was not measured."""
    if not (compared := ratios(timed, PLAIN, ENGINE)):
        return None
    overall = median(compared.values())
    later = {one.case: one.later_speed for one in timed if one.arm == ENGINE}
    after_first = median(
        one.later_speed / alone
        for one in timed
        if one.arm == PLAIN and one.later_speed is not None and (alone := later.get(one.case)) is not None
    )
    return (
        f"without drafts: {overall:.2f} times as fast as the engine in one process, {after_first:.2f} times after the "
        f"first token (aim: {AIM_PLAIN:g}{_missed(overall, AIM_PLAIN)})"
    )


def differences(timed: Iterable[TimedRequest]) -> list[str]:
    """Return the answers of the suite that differ from the first one to the same case. There must be none."""
    first: dict[Case, TimedRequest] = {}
    found = []
    for one in timed:
        reference = first.setdefault(one.case, one)
        if (reference.tokens, reference.finish) != (one.tokens, one.finish):
            same = agreement(reference.tokens, one.tokens)
            found.append(
                f"{one.case.name}, seed {one.case.seed}: {one.arm} with {one.delay_ms:g} ms differs from "
                f"{reference.arm} with {reference.delay_ms:g} ms after {same} tokens "
                f"({len(one.tokens)} tokens, {one.finish}; {len(reference.tokens)} tokens, {reference.finish})"
            )
    return found


def agreements(timed: Iterable[TimedRequest]) -> list[str]:
    """Return, for each other model, how many comparable answers equal the suite's completion.

    The first request for a case is the suite's. Its completion lacks the stop token, which the others may have.
    """
    completions: dict[Case, int] = {}
    compared = []
    for one in timed:
        completions.setdefault(one.case, len(one.tokens))
        if one.agrees is not None:
            compared.append(one)
    sentences = []
    for arm in dict.fromkeys(one.arm for one in compared):
        mine = [one for one in compared if one.arm == arm]
        differing = sorted(one.agrees or 0 for one in mine if (one.agrees or 0) < completions[one.case])
        where = f"; the others differ after {differing[0]} to {differing[-1]} tokens" if differing else ""
        sentences.append(
            f"{arm}: the suite's completion in {len(mine) - len(differing)} of {len(mine)} compared answers{where}"
        )
    return sentences


def _at_each(compared: dict[Case, float], temperatures: Sequence[float]) -> list[float | None]:
    """Return the medians at each temperature, and over all."""
    each = [_median(ratio for case, ratio in compared.items() if case.temperature == t) for t in temperatures]
    return [*each, _median(compared.values())]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def _missed(ratio: float, aim: float) -> str:
    return "" if ratio >= aim else ", missed"
