"""Recorded requests for injection into another suite, and the comparison of new texts with the recorded ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.tools.replayer.core.performance import ServedRequest, quantile
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.sessions import read_sessions
from shared.messages import Finish, Generate, Result, Status


@dataclass(frozen=True)
class InjectableRequest:
    """A recorded request with its recorded text and times. Times of messages in milliseconds since 1970."""

    at_ms: float
    key: str
    """Routing key of its Generate."""
    generate: Generate
    cancel_ms: float | None
    output: list[int]
    """Recorded tokens, up to the first gap in the recording."""
    ttft_ms: float | None
    tpot_ms: float | None


def injectable_requests(recording: Recording) -> list[InjectableRequest]:
    """Return the requests whose Generate was recorded, in order of time."""
    found = []
    for session in read_sessions(recording.entries()).values():
        if session.generate is None or session.generate_ms is None:
            continue
        known = session.output()
        start = len(session.generate.prompt)
        output: list[int] = []
        while start + len(output) in known:
            output.append(known[start + len(output)])
        ended = session.ended
        found.append(
            InjectableRequest(
                session.generate_ms,
                f"generate.{session.pool}",
                session.generate,
                session.cancelled_ms,
                output,
                ended.ttft_ms if ended else None,
                ended.tpot_ms if ended else None,
            )
        )
    return sorted(found, key=lambda request: (request.at_ms, request.generate.session))


@dataclass
class InjectedRequest:
    """A recorded request that runs again."""

    recorded: InjectableRequest
    session_id: str
    """Id of the new session."""
    served: ServedRequest
    tokens: dict[int, int] = field(default_factory=dict)
    """New tokens by position."""
    ended: str | None = None
    """`stop`, `length`, `cancelled`, or an error code; None while it runs."""

    def apply(self, result: Result, now_ms: float) -> None:
        """Take in a result of the new session."""
        if result.status is Status.FAILED:
            self.ended = self.ended or (result.error.code if result.error else "failed")
            return
        new = {p: t for p, t in enumerate(result.tokens, result.base_len) if p not in self.tokens}
        self.tokens |= new
        self.served.add_tokens(len(new), now_ms)
        if result.finish is not None:
            self.ended = str(result.finish)
            self.served.complete = True

    @property
    def differs_at(self) -> int | None:
        """The first position, counted from the prompt's first token, at which both texts have different tokens."""
        start = len(self.recorded.generate.prompt)
        for position, token in enumerate(self.recorded.output, start):
            if (now := self.tokens.get(position)) is None:
                return None
            if now != token:
                return position
        return None


@dataclass(frozen=True)
class InjectionReport:
    """Outcome of the injected requests. The fields are the keys of `wisp replay --inject --json`."""

    requests: int
    ended: dict[str, int]
    """Number of requests by ending; `unfinished` for those that did not end."""
    compared: int
    """Number of positions with a token in both texts."""
    differing: list[tuple[str, int]]
    """Recorded session ids whose texts differ, each with the first such position."""
    ttft_p50_ms: tuple[float | None, float | None]
    """(recorded, injected)."""
    tpot_p50_ms: tuple[float | None, float | None]
    """(recorded, injected)."""
    late_ms: float
    """The largest delay of a request against the recorded rhythm."""


def injection_report(injected: Sequence[InjectedRequest], late_ms: float) -> InjectionReport:
    """Sum up injected requests. The times are of those that completed."""
    compared = sum(min(len(request.tokens), len(request.recorded.output)) for request in injected)
    differing = [
        (request.recorded.generate.session, at) for request in injected if (at := request.differs_at) is not None
    ]
    complete = [request for request in injected if request.ended in (Finish.STOP, Finish.LENGTH)]
    return InjectionReport(
        requests=len(injected),
        ended=dict(Counter(request.ended or "unfinished" for request in injected).most_common()),
        compared=compared,
        differing=differing,
        ttft_p50_ms=(
            _median([request.recorded.ttft_ms for request in complete]),
            _median([request.served.ttft_ms for request in complete]),
        ),
        tpot_p50_ms=(
            _median([request.recorded.tpot_ms for request in complete]),
            _median([request.served.tpot_ms for request in complete]),
        ),
        late_ms=late_ms,
    )


def _median(values: list[float | None]) -> float | None:
    return quantile([value for value in values if value is not None], 0.5)
