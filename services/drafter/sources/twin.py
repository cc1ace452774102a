"""Drafts of a twin: synthetic tokens or those of a trace, made by the code that drafts with a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.drafter.control import DraftDecision, DraftToken
from services.drafter.core.draft import AheadRequest, PreparedDraft
from services.drafter.core.lookup import LOOKUP
from services.drafter.core.synthetic import DraftProcess
from services.drafter.hidden.forward import Floats
from services.drafter.sources.hidden import DraftInProgress, HiddenDrafts
from services.drafter.sources.registry import HIDDEN
from shared.engine.blocks import BlockPool
from shared.errors import EngineError
from shared.kernels.layout import BLOCK
from shared.twin.lateness import wait_for_step
from shared.twin.spec import Acceptance
from shared.twin.text import SyntheticText
from shared.twin.trace import AGREED, CONTESTED, COPIED, DEPTH, PRESENT, DraftChain, Trace, TraceText

if TYPE_CHECKING:
    from services.drafter.hidden.engine import DraftStep


class TwinDraftEngine:
    """The part of `services.drafter.hidden.engine.DraftEngine` that drafting uses, without a model."""

    hidden_size = 1

    def __init__(self, budget_tokens: int, step_ms: float) -> None:
        """step_ms: time of a step of all sessions; 0 if an emulated device takes it."""
        self.head_ids: NDArray[np.int64] = np.zeros(1, np.int64)
        self._pool = BlockPool(max(1, budget_tokens // BLOCK))
        self._step_ms = step_ms

    def open(self, session_id: str) -> None:
        """Begin a session; does nothing if it exists."""
        if session_id not in self._pool.sessions:
            self._pool.attach(session_id, [])

    def length(self, session_id: str) -> int:
        """Return the number of the session's tokens that are held."""
        return self._pool.length(session_id)

    def truncate(self, session_id: str, length: int) -> None:
        """Roll a session back to its first `length` tokens."""
        self._pool.truncate(session_id, length)

    def release(self, session_id: str) -> None:
        """End a session."""
        self._pool.release(session_id)

    @property
    def branch_room(self) -> int:
        """Number of branches: none."""
        return 0

    def branch(self, session_id: str, branch: str, length: int) -> None:
        """Raise NotImplementedError: a twin prepares no drafts."""
        raise NotImplementedError

    def discard(self, session_id: str) -> None:
        """Raise NotImplementedError: a twin prepares no drafts."""
        raise NotImplementedError

    def forward(self, steps: Sequence[DraftStep]) -> Floats:
        """Hold the steps' tokens, and wait for the time of a step. Raises TooLong and CacheFull."""
        if any(len(step.tokens) < 1 for step in steps):
            raise EngineError("every step needs at least one token")
        started_s = time.perf_counter()
        self._pool.grow({step.session_id: len(step.tokens) for step in steps})
        for step in steps:
            self._pool.append(step.session_id, step.tokens)
        self.take_steps(1, started_s)
        return np.zeros((len(steps), self.hidden_size), np.float32)

    def take_steps(self, count: int, started_s: float) -> None:
        """Wait until this many steps that began at a time are over."""
        if took_ms := count * self._step_ms:
            wait_for_step(started_s, took_ms)

    def logits(self, estimates: Floats) -> Floats:
        """Raise NotImplementedError: the tokens of a twin come from its text."""
        raise NotImplementedError


class _DraftsWithoutModel(HiddenDrafts):
    """Drafts that come from no logits. They know no runners-up, and prepare no drafts."""

    def ahead(self, requests: Sequence[AheadRequest]) -> list[list[PreparedDraft]]:
        """Return no drafts."""
        return [[] for _ in requests]


class TwinDrafts(_DraftsWithoutModel):
    """Drafts whose tokens are right with the chances of a twin's description."""

    def __init__(self, engine: TwinDraftEngine, acceptance: Acceptance, text: SyntheticText) -> None:
        super().__init__(engine)
        self._acceptance, self._text = acceptance, text
        self._processes: dict[str, DraftProcess] = {}

    def close(self, session_id: str) -> None:
        """Forget a session."""
        self._processes.pop(session_id, None)
        super().close(session_id)

    def _choose(self, drafts: Sequence[DraftInProgress]) -> tuple[list[int], list[DraftToken]]:
        chosen, tokens = [], []
        for draft in drafts:
            request = draft.request
            seed, base = request.sampling.seed, len(request.tokens) - request.prompt_len
            process = self._processes.get(request.session_id)
            if process is None:
                process = self._processes[request.session_id] = DraftProcess(self._acceptance, seed)
            ahead = len(draft.tokens)
            drafted = process.token(base, ahead)
            of_text = self._text.token if drafted.right else self._text.other
            chosen.append(of_text(seed, base + ahead))
            tokens.append(drafted.token)
        return chosen, tokens


class TraceDrafts(_DraftsWithoutModel):
    """Drafts of a trace. A request that allows lookup gets the recorded drafts of both sources."""

    def __init__(self, engine: TwinDraftEngine, trace: Trace) -> None:
        super().__init__(engine)
        self._steps_of = engine.take_steps
        self._trace, self._text = trace, TraceText(trace)

    def _draft(self, drafts: Sequence[DraftInProgress], going: Sequence[int]) -> None:
        started_s = time.perf_counter()
        for i in going:
            self._follow(drafts[i])
        # The step of the committed tokens has given the first token.
        self._steps_of(max((drafts[i].steps - 1 for i in going), default=0), started_s)

    def _follow(self, draft: DraftInProgress) -> None:
        """Add the recorded tokens, as many as the round wants."""
        name, row = "combined" if draft.copies else "hidden", self._row(draft)
        while len(draft.tokens) < DEPTH:
            found = self._recorded(name, row, len(draft.tokens))
            if found is None or not draft.request.round.wants(found[1].source):
                return
            token_id, token = found
            draft.steps += token.source == HIDDEN
            if draft.add(token_id, token) is not DraftDecision.MORE:
                return

    def _choose(self, drafts: Sequence[DraftInProgress]) -> tuple[list[int], list[DraftToken]]:
        """Return the model's next token for each draft; where none is recorded, a wrong one that looks unlikely."""
        chosen, tokens = [], []
        for draft in drafts:
            request, ahead = draft.request, len(draft.tokens)
            index = len(request.tokens) - request.prompt_len + ahead
            found = self._recorded("hidden", self._row(draft), ahead) if ahead < DEPTH else None
            token_id, token = found or (self._text.other(request.sampling.seed, index), DraftToken(HIDDEN))
            chosen.append(token_id)
            tokens.append(token)
        return chosen, tokens

    def _row(self, draft: DraftInProgress) -> int:
        request = draft.request
        return self._text.place(request.sampling.seed, len(request.tokens) - request.prompt_len)

    def _recorded(self, name: str, row: int, ahead: int) -> tuple[int, DraftToken] | None:
        """Return the token of a chain `ahead` tokens after its row; None if there is none."""
        chain = self._trace.chains[name]
        flags = int(chain.flags[row, ahead])
        if not flags & PRESENT:
            return None
        return int(chain.tokens[row, ahead]), token_of(LOOKUP if flags & COPIED else HIDDEN, chain, row, ahead)


def token_of(source: str, chain: DraftChain, row: int, ahead: int) -> DraftToken:
    """Return the statistics of a recorded draft token."""
    confidence, entropy, margin, spread = map(float, chain.statistics[row, ahead])
    flags = int(chain.flags[row, ahead])
    return DraftToken(
        source,
        confidence,
        entropy,
        margin,
        spread,
        support=int(chain.support[row, ahead]),
        agreed=bool(flags & AGREED),
        contested=bool(flags & CONTESTED),
    )
