"""Recorded requests, to be asked again of another suite, and what became of them there. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.tools.replayer.core.performance import Served, quantile
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.sessions import Lives
from shared.messages import Finish, Generate, Result, Status


@dataclass(frozen=True)
class Asked:
    """A recorded request. Times in milliseconds since 1970."""

    at_ms: float
    key: str
    """Routing key of its Generate."""
    generate: Generate
    cancel_ms: float | None
    output: list[int]
    """What it got when it was recorded, as far as that is known without a gap."""
    ttft_ms: float | None
    tpot_ms: float | None


def requests_of(recording: Recording) -> list[Asked]:
    """The requests whose beginning was recorded, in order of time."""
    found = []
    for life in Lives().read(recording.entries()).of.values():
        if life.generate is None or life.generate_ms is None:
            continue
        known = life.output()
        start = len(life.generate.prompt)
        output: list[int] = []
        while start + len(output) in known:
            output.append(known[start + len(output)])
        ended = life.ended
        found.append(
            Asked(
                life.generate_ms,
                f"generate.{life.pool}",
                life.generate,
                life.cancelled_ms,
                output,
                ended.ttft_ms if ended else None,
                ended.tpot_ms if ended else None,
            )
        )
    return sorted(found, key=lambda asked: (asked.at_ms, asked.generate.session))


@dataclass
class Again:
    """A request that was asked again."""

    asked: Asked
    session: str
    """Its name this time."""
    served: Served
    tokens: dict[int, int] = field(default_factory=dict)
    """By position."""
    ended: str | None = None
    """`stop`, `length`, `cancelled`, or why it failed; None while it runs."""

    def take(self, result: Result, now_ms: float) -> None:
        """Take in one of its results."""
        if result.status is Status.FAILED:
            self.ended = self.ended or (result.error.code if result.error else "failed")
            return
        new = {p: t for p, t in enumerate(result.tokens, result.base_len) if p not in self.tokens}
        self.tokens |= new
        self.served.got(len(new), now_ms)
        if result.finish is not None:
            self.ended = str(result.finish)
            self.served.complete = True

    @property
    def differs_at(self) -> int | None:
        """The first position, counted from the prompt's first token, at which the texts differ as far as both go."""
        start = len(self.asked.generate.prompt)
        for position, token in enumerate(self.asked.output, start):
            if (now := self.tokens.get(position)) is None:
                return None
            if now != token:
                return position
        return None


@dataclass(frozen=True)
class Answers:
    """What became of all of them."""

    requests: int
    ended: dict[str, int]
    """How they ended, `unfinished` among it."""
    compared: int
    """Tokens that were there both times."""
    differing: list[tuple[str, int]]
    """Recorded names of sessions whose texts differ, and where."""
    ttft_p50_ms: tuple[float | None, float | None]
    """Recorded, and now."""
    tpot_p50_ms: tuple[float | None, float | None]
    late_ms: float
    """How late a request was sent at worst."""


def answers(asked: Sequence[Again], late_ms: float) -> Answers:
    """Sum up."""
    compared = sum(min(len(one.tokens), len(one.asked.output)) for one in asked)
    differing = [(one.asked.generate.session, at) for one in asked if (at := one.differs_at) is not None]
    whole = [one for one in asked if one.ended in (Finish.STOP, Finish.LENGTH)]

    def medians(then: list[float | None], now: list[float | None]) -> tuple[float | None, float | None]:
        return _median(then), _median(now)

    return Answers(
        requests=len(asked),
        ended=dict(Counter(one.ended or "unfinished" for one in asked).most_common()),
        compared=compared,
        differing=differing,
        ttft_p50_ms=medians([one.asked.ttft_ms for one in whole], [one.served.ttft_ms for one in whole]),
        tpot_p50_ms=medians([one.asked.tpot_ms for one in whole], [one.served.tpot_ms for one in whole]),
        late_ms=late_ms,
    )


def _median(values: list[float | None]) -> float | None:
    return quantile([value for value in values if value is not None], 0.5)
