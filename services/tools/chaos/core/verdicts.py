"""Verdicts on requests, and the result of a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from services.tools.chaos.core.faults import Fault
from services.tools.chaos.core.requests import ChaosRequest

if TYPE_CHECKING:
    from pathlib import Path

RECOVERY_S = 10.0
"""Time that services may need after a server that lost its data is back."""
LOST_CODES = frozenset({"session_gone", "stream_gone", "timeout", "cancelled"})
"""Error codes of a request whose session was lost or given up."""


class RequestVerdict(StrEnum):
    """The verdict on one request."""

    RIGHT = "right"
    LEFT = "left"
    """The client left; all tokens until then were right."""
    ERROR = "error"
    """The API ended the request with an error."""
    WRONG = "wrong"
    LOST = "lost"


@dataclass
class RequestOutcome:
    """One request from its first attempt to its end. Times are seconds of `time.monotonic`."""

    request: ChaosRequest
    started_s: float
    ended_s: float = 0.0
    verdict: RequestVerdict = RequestVerdict.LOST
    detail: str = ""
    code: str = ""
    """Code of the error that ended it."""
    session_ids: list[str] = field(default_factory=list)
    """Sessions of its attempts."""
    refused: int = 0
    """Attempts that were not accepted."""
    resumed: int = 0
    """Times that its stream was resumed."""
    longest_stall_s: float = 0.0
    """Longest time without new tokens, the time to the first one included."""

    @property
    def troubled(self) -> bool:
        """True if the client had to retry or to resume."""
        return self.refused > 0 or self.resumed > 0

    def overlaps(self, began_s: float, ended_s: float) -> bool:
        """Return whether the request was in progress at some time from `began_s` to `ended_s`."""
        return self.started_s <= ended_s and began_s <= self.ended_s


@dataclass
class InjectedFault:
    """A fault that was injected. Times are seconds of `time.monotonic`."""

    fault: Fault
    target: str
    began_s: float
    ended_s: float = 0.0
    """Time at which the target was back; 0 until then."""


@dataclass
class ChaosResult:
    """The result of a run."""

    faults: list[InjectedFault]
    outcomes: list[RequestOutcome]
    sessions: int = 0
    """Sessions whose committed tokens were compared with the reference."""
    results: int = 0
    """Results in the journal that were compared with Redis."""
    run_results: int = 0
    """Compared results that report tokens of runs."""
    problems: list[str] = field(default_factory=list)
    """Everything that makes the run fail."""
    seconds: float = 0.0
    poisoned: int = 0
    """Dead letters that are poison of this run, and expected."""
    logs: Path | None = None
    """Folder of the services' logs, kept when there are problems."""

    def excused(self, outcome: RequestOutcome) -> bool:
        """Return whether an error is acceptable: a server lost the request's data meanwhile."""
        return outcome.code in LOST_CODES and any(
            outcome.overlaps(one.began_s, one.ended_s + RECOVERY_S) for one in self.faults if one.fault.kind.loses_data
        )

    def count(self, verdict: RequestVerdict) -> int:
        """Return the number of requests with this verdict."""
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    def conclude(self) -> None:
        """Add a problem for every request that is wrong or lost, or that failed without an excuse."""
        for one in self.outcomes:
            bad = one.verdict in (RequestVerdict.WRONG, RequestVerdict.LOST)
            if bad or (one.verdict is RequestVerdict.ERROR and not self.excused(one)):
                sessions = ", ".join(one.session_ids) or "none"
                self.problems.append(
                    f"request {one.request.name} ({one.request.manner}, sessions {sessions}) is {one.verdict}: "
                    f"{one.detail}"
                )
