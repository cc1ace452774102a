"""The requests of sessions, their numbers, and files of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import SettingsError, in_words
from shared.messages import Slo

NUMBERS_PER_POINT = 1 << 12
"""Most requests of a session in one point."""
MOST_SESSIONS = 1 << 12


class LoadRequest(BaseModel):
    """One request as it is sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session: Annotated[int, Field(ge=0)]
    number: Annotated[int, Field(ge=0)]
    messages: Annotated[list[dict[str, str]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    service_class: str = "default"
    tier: str | None = None
    slo: Slo | None = None
    device: str = ""
    draft: str = ""
    """Name of the draft source; empty leaves the choice to the drafter."""
    think_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Pause of the session before the request, in a closed loop."""


class RequestSource(Protocol):
    """A source of requests."""

    def request(self, session: int, number: int) -> LoadRequest:
        """Return request `number` of a session."""
        ...


def first_number(sessions: int, repeat: int) -> int:
    """Return the number of each session's first request in a point. No two points share a number."""
    return (repeat * MOST_SESSIONS + sessions) * NUMBERS_PER_POINT


@dataclass(frozen=True)
class RecordedRequests:
    """Requests from a file instead of a workload.

    A session takes its requests by number. For a number that the file lacks, it takes the requests of its list in
    turn; for a session that the file lacks, those of another session. So a file written by a run repeats that run, and
    any other list of requests works too.
    """

    requests: Sequence[LoadRequest]

    @cached_property
    def _lists(self) -> dict[int, list[LoadRequest]]:
        lists: dict[int, list[LoadRequest]] = {}
        for request in sorted(self.requests, key=lambda one: (one.session, one.number)):
            lists.setdefault(request.session, []).append(request)
        return lists

    @cached_property
    def _by_number(self) -> dict[tuple[int, int], LoadRequest]:
        return {(request.session, request.number): request for request in self.requests}

    def request(self, session: int, number: int) -> LoadRequest:
        """Return request `number` of a session, or the one whose turn it is."""
        if (session, number) in self._by_number:
            return self._by_number[session, number]
        lists = list(self._lists.values())
        mine = self._lists.get(session, lists[session % len(lists)])
        found = mine[number % NUMBERS_PER_POINT % len(mine)]
        return found.model_copy(update={"session": session, "number": number})


def to_lines(requests: Sequence[LoadRequest]) -> str:
    """Return requests as JSON lines, by session and number."""
    ordered = sorted(requests, key=lambda one: (one.session, one.number))
    return "".join(one.model_dump_json(exclude_none=True) + "\n" for one in ordered)


def from_lines(text: str) -> RecordedRequests:
    """Parse requests from JSON lines. Raises SettingsError, which names the line."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(LoadRequest.model_validate_json(line))
        except ValidationError as error:
            one = error.errors(include_url=False)[0]
            where = ".".join(str(step) for step in one["loc"])
            raise SettingsError(f"line {number} of the requests: {where}: {in_words(one)}") from error
    if not found:
        raise SettingsError("the file of requests is empty; write one with --write-requests")
    return RecordedRequests(found)
