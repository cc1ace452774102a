"""What a drafter keeps of each session that it serves, and drafts that it makes ahead."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from services.drafter.control import Round, SessionControl
from services.drafter.core.hidden_rows import HiddenRows
from services.drafter.core.session import DraftSession
from services.drafter.link import EmulatedDevice
from services.drafter.sources import Ahead, Draft, DraftRequest, States
from services.drafter.worker import SourceWorker


@dataclass
class Serving:
    """A session with everything that drafting for it needs."""

    session: DraftSession
    worker: SourceWorker
    names: tuple[str, ...]
    control: SessionControl
    states: HiddenRows | None
    device: EmulatedDevice | None
    ahead: tuple[list[int], Draft, Round] | None = None
    """The draft for the next round, if the session's tokens are then these."""

    def request(self, round_: Round) -> DraftRequest:
        """What the source is asked for now."""
        session = self.session
        if self.states is None:
            states = None
        else:
            # The last token is always computed again, and each token with the state before it.
            seen = min(self.worker.source.seen(session.name), len(session.tokens) - 1)
            self.states.need_from(max(0, seen - 1))
            start, rows = self.states.run(len(session.tokens))
            states = States(start, rows.copy()) if len(rows) else None
        return DraftRequest(session.name, session.tokens, session.generate.sampling, round_, self.names, states)


@dataclass(frozen=True)
class AheadInMaking:
    """A draft being made for the round after the one in flight; `tokens` are the session's if all is accepted."""

    tokens: list[int]
    round: Round
    answer: asyncio.Future[tuple[Ahead | None, float]]
    started_s: float

    def made(self, device: EmulatedDevice | None) -> tuple[list[int], Draft, Round] | None:
        """What came of it, if it is there already: it is not worth waiting for."""
        if not self.answer.done():
            self.answer.cancel()
            return None
        made, _ = self.answer.result()
        if made is None:
            return None
        if device is not None and (time.monotonic() - self.started_s) * 1000 < device.profile.ahead_ms(made.draft):
            return None
        return [*self.tokens, made.bonus], made.draft, self.round
