"""What the client waits for: the running sessions of one request, and their text as it becomes ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import monotonic

from services.gateway.core.completion import Piece, Session
from services.gateway.core.slo import Outcome
from services.gateway.errors import from_failure
from services.gateway.request import Plan
from shared.messages import Finish


@dataclass
class Live:
    """A session that runs, and when it was last heard of (seconds of this process's clock)."""

    plan: Plan
    session: Session
    wake: asyncio.Event
    """Set when there is something to take; shared by the texts of one request."""
    started_s: float
    progress_s: float
    pause_s: float
    check_s: float
    """When the session's state is read from Redis, unless there is news before."""
    first_s: float | None = None
    origin: str = ""
    """The gateway that began it, where that is another one."""
    outcome: Outcome | None = None
    """Set at the end."""
    token_s: float = 0.0
    checking: bool = False
    """Whether the state is being read."""
    check_again: bool = False
    """Whether it has to be read once more, as a gap showed while it was being read."""


@dataclass
class Run:
    """The sessions of one request."""

    lives: list[Live]
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def batches(self) -> AsyncIterator[list[tuple[int, Piece | Finish]]]:
        """What is ready, by the text's index: pieces, and the reason when a text is complete.

        Raises ApiError when one of them fails.
        """
        left = list(range(len(self.lives)))
        while left:
            await self.wake.wait()
            self.wake.clear()
            batch: list[tuple[int, Piece | Finish]] = []
            for index in tuple(left):
                session = self.lives[index].session
                batch += [(index, piece) for piece in session.take()]
                if session.failure is not None:
                    if batch:
                        yield batch
                    raise from_failure(session.failure)
                if session.finish is not None:
                    batch.append((index, session.finish))
                    left.remove(index)
            if batch:
                yield batch

    @property
    def ttft_ms(self) -> float:
        """From the request to its first token."""
        first = [live.first_s - live.started_s for live in self.lives if live.first_s is not None]
        return min(first, default=0.0) * 1000

    @property
    def total_ms(self) -> float:
        """From the request to now."""
        return (monotonic() - self.lives[0].started_s) * 1000
