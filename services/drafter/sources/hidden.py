"""Drafts by a model that reads the target's hidden states, for all sessions in packed steps, with copies if allowed.

In a request that allows lookup too, the model's token is compared with the token that lookup would copy. Where both
agree, the token is likelier to be accepted, and copying continues as far as the controller allows; where they differ,
the likelier one by the controller's estimate is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from services.drafter.control import DraftDecision, DraftToken
from services.drafter.core.draft import AheadRequest, Draft, DraftRequest, PreparedDraft
from services.drafter.core.lookup import LOOKUP, CopyText
from services.drafter.core.outcomes import Outcome, likely_outcomes
from services.drafter.hidden.engine import DraftEngine, DraftStep
from services.drafter.hidden.forward import Floats
from services.drafter.sources.registry import HIDDEN
from services.drafter.sources.statistics import draft_tokens
from shared.errors import EngineError
from shared.sampling.likely import likely_choices
from shared.sampling.rules import LogitsProcessor
from shared.sampling.sampler import Columns, choose_in_rows

if TYPE_CHECKING:
    from services.drafter.sources.twin import TwinDraftEngine

WINDOW = 8
"""Most committed tokens that are computed for a session at once: the states before them hold what came earlier.

A longer window, or the whole prompt, is accepted no more often on held-out texts, and costs short answers more."""


@dataclass
class _HiddenSession:
    """A session's state between calls."""

    first: int = 0
    """Position of the first token that the engine holds, which counts it as position 0."""
    seen: int = 0
    """Position after the last token computed from the target's own states; tokens that the engine holds beyond it rest
    on estimates."""
    latest: Floats | None = None
    """The model's estimate at the last token that the engine holds: (hidden size,)."""
    estimates: dict[int, Floats] = field(default_factory=dict)
    """Its estimates by position, from the last token that was computed from the target's own states on."""
    text: CopyText = field(default_factory=CopyText)


@dataclass
class DraftInProgress:
    """A draft that grows token by token."""

    request: DraftRequest
    session: _HiddenSession
    tokens: list[int] = field(default_factory=list)
    dropped: int | None = None
    steps: int = 0
    computed: int = 0
    assumed: Sequence[int] = ()
    """The last of the request's tokens if they are not committed yet."""
    wanted: Callable[[], bool] = lambda: True

    @property
    def position(self) -> int:
        """Position of the token to be drafted next."""
        return len(self.request.tokens) + len(self.tokens)

    @property
    def copies(self) -> bool:
        """True if the request allows lookup."""
        return LOOKUP in self.request.sources

    def copy(self) -> tuple[int, int] | None:
        """Return the token that lookup would copy next, and how many tokens before it match."""
        if not self.copies:
            return None
        proposed, support = self.session.text.continuation(1, [*self.assumed, *self.tokens])
        mask = self.request.mask(self.tokens)
        return (proposed[0], support) if proposed and (mask is None or mask.allows(proposed[0])) else None

    def processor(self) -> LogitsProcessor | None:
        """Return the rules of the token to be drafted next; None without rules."""
        request = self.request
        if request.sampling.rules is None and request.grammar is None:
            return None
        return LogitsProcessor(request.sampling, [*request.tokens, *self.tokens], request.mask(self.tokens))

    def step(self, token: int) -> DraftStep:
        """Return the step that computes `token` after everything that the engine holds."""
        assert self.session.latest is not None
        return DraftStep(self.request.session_id, [token], self.session.latest[None])

    def finished(self) -> Draft:
        """Return the draft."""
        return Draft(self.tokens, {HIDDEN: self.steps} if self.steps else {}, self.computed, self.dropped)

    def add(self, token_id: int, token: DraftToken) -> DraftDecision:
        """Add a token to the round, and to the draft unless the round drops it."""
        decision = self.request.round.add(token)
        if decision is DraftDecision.DROP:
            self.dropped = token_id
        else:
            self.tokens.append(token_id)
        return decision


class HiddenDrafts:
    """A hidden-state draft model on its engine."""

    blocking = True

    def __init__(self, engine: DraftEngine | TwinDraftEngine, window: int = WINDOW) -> None:
        """window: most committed tokens that are computed for a session at once."""
        self._engine = engine
        self._window = window
        self._columns = Columns.of(engine.head_ids)
        self._sessions: dict[str, _HiddenSession] = {}

    def computes(self, request: DraftRequest) -> bool:
        """Return whether the round wants the model's tokens; copies alone need no model."""
        return request.round.wants(HIDDEN)

    def starts_at(self, session_id: str, count: int) -> int:
        """Return the position of the first token to compute: that after the tokens computed from the target's own
        states and still held, or `window` tokens before the end if these end earlier."""
        known = self._sessions.get(session_id)
        # The last token is always computed again: the session may have been drafted for with another one there.
        seen = 0 if known is None else min(self._seen(session_id, known), count - 1)
        if known is not None and seen <= known.first:
            seen = 0
        return max(0, seen, count - self._window)

    def _seen(self, session_id: str, known: _HiddenSession) -> int:
        """Return the position after the last token computed from the target's own states and still held."""
        held = self._engine.length(session_id)
        return min(known.seen, known.first + held) if held else 0

    def close(self, session_id: str) -> None:
        """Free the session's cache."""
        self._sessions.pop(session_id, None)
        self._engine.release(session_id)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Draft for all sessions, one packed step per position.

        A session whose states or cache room are missing gets copies, if allowed, or an empty draft.
        """
        drafts = [
            DraftInProgress(request, self._sessions.get(request.session_id) or self._begin(request))
            for request in requests
        ]
        steps: dict[int, DraftStep] = {}
        for i, draft in enumerate(drafts):
            request = draft.request
            if draft.copies:
                draft.session.text.extend(request.tokens)
            if request.round.wants(HIDDEN) and (step := self._catch_up(draft)) is not None:
                steps[i] = step
        computed = self._forward(drafts, steps)
        for i, draft in enumerate(drafts):
            if i in computed:
                draft.session.seen = len(draft.request.tokens)
                draft.computed = len(steps[i].tokens)
            elif draft.copies and draft.request.round.wants(LOOKUP):
                _copy(draft, agreed=False)
        self._draft(drafts, computed)
        return [draft.finished() for draft in drafts]

    def _begin(self, request: DraftRequest) -> _HiddenSession:
        session = self._sessions[request.session_id] = _HiddenSession(text=CopyText(request.prediction))
        return session

    def ahead(self, requests: Sequence[AheadRequest]) -> list[list[PreparedDraft]]:
        """Prepare drafts for the likely outcomes of rounds in flight, all in packed steps."""
        flying = [
            DraftInProgress(
                replace(one.request, tokens=[*one.request.tokens, *one.draft.tokens]),
                self._sessions.get(one.request.session_id) or _HiddenSession(),
            )
            for one in requests
        ]
        complete = self._complete(requests, flying)
        chosen = [(i, outcome) for i in complete for outcome in self._outcomes(requests[i])]
        drafts: list[DraftInProgress] = []
        prepared: list[list[PreparedDraft]] = [[] for _ in requests]
        try:
            for i, outcome in chosen[: self._engine.branch_room]:
                drafts.append(self._branch(requests[i], flying[i].session, outcome, len(drafts)))
            steps = {
                n: draft.step(draft.assumed[-1])
                for n, draft in enumerate(drafts)
                if draft.wanted() and draft.request.round.wants(HIDDEN)
            }
            self._draft(drafts, self._forward(drafts, steps))
        finally:
            for draft in drafts:
                self._engine.discard(draft.request.session_id)
        for (i, _), draft in zip(chosen, drafts, strict=False):
            if draft.tokens:
                prepared[i].append(PreparedDraft([*draft.assumed], draft.finished(), draft.request.round))
        return prepared

    def _complete(self, requests: Sequence[AheadRequest], flying: Sequence[DraftInProgress]) -> list[int]:
        """Compute the tokens of sessions and their drafts in flight that are not computed yet.

        Returns the indices of those that are then computed to their end. flying: the same with the draft's tokens.
        """
        alive: set[int] = set()
        steps: dict[int, DraftStep] = {}
        for i, (one, draft) in enumerate(zip(requests, flying, strict=True)):
            request, session = one.request, draft.session
            if request.session_id not in self._sessions or not one.wanted():
                continue
            if self._seen(request.session_id, session) == len(request.tokens):
                # The engine may hold other tokens than were sent, if the draft was cut.
                held = min(session.first + self._engine.length(request.session_id), len(draft.request.tokens))
                self._engine.truncate(request.session_id, held - session.first)
                session.latest = session.estimates[held - 1]
                alive.add(i)
            elif (step := self._catch_up(DraftInProgress(request, session))) is not None:
                steps[i] = step
        for i in self._forward(flying, steps):
            flying[i].session.seen = len(requests[i].request.tokens)
            alive.add(i)
        while behind := {
            i: step for i in alive if requests[i].wanted() and (step := self._behind(flying[i])) is not None
        }:
            alive -= behind.keys() - self._forward(flying, behind)
        # A later session's step may have evicted an earlier one.
        return sorted(
            i
            for i in alive
            if flying[i].session.first + self._engine.length(flying[i].request.session_id)
            == len(flying[i].request.tokens)
        )

    def _outcomes(self, one: AheadRequest) -> list[Outcome]:
        """Return the likely outcomes of a round in flight; none once they are no longer wanted."""
        request, drafted = one.request, one.draft.tokens
        session = self._sessions[request.session_id]
        if not one.wanted():
            return []
        last = len(request.tokens) - 1
        estimates = [session.estimates[last + count] for count in range(len(drafted) + 1)]
        choices = []
        for count, logits in enumerate(self._engine.logits(np.stack(estimates))):
            # With a large vocabulary, the choices of a place take as long as a draft step.
            if not one.wanted():
                return []
            draft = DraftInProgress(request, session, drafted[:count])
            choices.append(
                # One more, since a rejected token is no choice.
                likely_choices(logits, request.sampling, draft.position, self._columns, one.most + 1, draft.processor())
            )
        return likely_outcomes(drafted, request.round.acceptance, choices, one.most)

    def _branch(self, one: AheadRequest, session: _HiddenSession, outcome: Outcome, number: int) -> DraftInProgress:
        """Return a draft after an outcome, in a branch of the session's KV."""
        request, name = one.request, f"{one.request.session_id} ahead {number}"
        if LOOKUP in request.sources:
            session.text.extend(request.tokens)
        assumed = [*one.draft.tokens[: outcome.accepted], outcome.bonus]
        known = len(request.tokens) + outcome.accepted
        self._engine.branch(request.session_id, name, known - session.first)
        branch = _HiddenSession(first=session.first, latest=session.estimates[known - 1], text=session.text)
        following = replace(
            request, session_id=name, tokens=[*request.tokens, *assumed], round=one.begin(len(assumed)), states=None
        )
        return DraftInProgress(following, branch, assumed=assumed, wanted=one.wanted)

    def _catch_up(self, draft: DraftInProgress) -> DraftStep | None:
        """Return the step that computes the committed tokens not computed yet; None if a state is missing."""
        request, session = draft.request, draft.session
        count = len(request.tokens)
        self._engine.open(request.session_id)
        start = self.starts_at(request.session_id, count)
        seen = self._seen(request.session_id, session)
        states = request.states
        needed = max(0, start - 1)
        if states is None or states.start > needed or states.start + len(states.rows) != count - 1:
            return None
        if start > seen or start <= session.first:
            # Too many tokens are missing, or all that were held are gone: begin anew.
            session.first = start
        self._engine.truncate(request.session_id, start - session.first)
        session.seen = start
        session.estimates.clear()
        before = states.rows[needed - states.start :]
        if start == 0:  # the first token has no state before it
            before = np.concatenate([np.zeros((1, self._engine.hidden_size), np.float32), before])
        return DraftStep(request.session_id, request.tokens[start:], before)

    def _behind(self, draft: DraftInProgress) -> DraftStep | None:
        """Return the step for the first token that the engine does not hold."""
        held = draft.session.first + self._engine.length(draft.request.session_id)
        return draft.step(draft.request.tokens[held]) if held < len(draft.request.tokens) else None

    def _forward(self, drafts: Sequence[DraftInProgress], steps: dict[int, DraftStep]) -> list[int]:
        """Compute steps, keyed by index into `drafts`, and return the indices of those that succeeded.

        A step whose estimate is not finite, since the target's states are broken, counts as failed.
        """
        if not steps:
            return []
        try:
            estimates = self._engine.forward(list(steps.values()))
        except EngineError:
            # Too many steps for the cache, or one that is too long: halve them until what fits has been computed.
            if len(steps) == 1:
                return []
            items = list(steps.items())
            half = len(items) // 2
            return self._forward(drafts, dict(items[:half])) + self._forward(drafts, dict(items[half:]))
        with np.errstate(invalid="ignore", over="ignore"):
            totals = estimates.sum(-1)
        # A sum is finite only if all of its values are.
        sound = [i for i, total in zip(steps, totals.tolist(), strict=True) if math.isfinite(total)]
        for i, estimate in zip(steps, estimates, strict=True):
            session, name = drafts[i].session, drafts[i].request.session_id
            session.latest = session.estimates[session.first + self._engine.length(name) - 1] = estimate
        return sound

    def _draft(self, drafts: Sequence[DraftInProgress], going: Sequence[int]) -> None:
        """Draft token by token while the rounds want more. going: indices of drafts whose last token is computed."""
        while going := [i for i in going if drafts[i].wanted() and drafts[i].request.round.wants(HIDDEN)]:
            chosen, tokens = self._choose([drafts[i] for i in going])
            steps: dict[int, DraftStep] = {}
            for i, token_id, token in zip(going, chosen, tokens, strict=True):
                draft = drafts[i]
                draft.steps += 1
                added = _compared(draft, token_id, token)
                if added is None:
                    continue
                if draft.add(token_id, added) is DraftDecision.MORE and draft.request.round.wants(HIDDEN):
                    steps[i] = draft.step(token_id)
            going = self._forward(drafts, steps)

    def _choose(self, drafts: Sequence[DraftInProgress]) -> tuple[list[int], list[DraftToken]]:
        """Return the id of the model's next token for each draft, and its statistics."""
        if not drafts:
            return [], []
        logits = self._engine.logits(np.stack([d.session.latest for d in drafts if d.session.latest is not None]))
        samplings, positions = [d.request.sampling for d in drafts], [d.position for d in drafts]
        processors = [d.processor() for d in drafts]
        chosen = choose_in_rows(logits, samplings, positions, self._columns, processors)
        return chosen, draft_tokens(HIDDEN, logits, self._columns.ids.searchsorted(chosen).tolist())


def _compared(draft: DraftInProgress, token_id: int, token: DraftToken) -> DraftToken | None:
    """Compare the model's token with the one that lookup would copy.

    Returns the token to add, or None if copies were added instead.
    """
    if (found := draft.copy()) is None:
        return token
    copied, support = found
    if copied == token_id:
        _copy(draft, agreed=True)
        return None
    contested = replace(token, contested=True)
    round_ = draft.request.round
    if round_.estimate(DraftToken(LOOKUP, support=support, contested=True)) <= round_.estimate(contested):
        return contested
    _copy(draft, agreed=False, contested=True)
    return None


def _copy(draft: DraftInProgress, *, agreed: bool, contested: bool = False) -> None:
    """Copy as far as the controller allows. agreed, contested: whether the model's token is the first of the copies."""
    round_ = draft.request.round
    room = round_.longest - len(draft.tokens)
    proposed, support = draft.session.text.continuation(room, [*draft.assumed, *draft.tokens])
    mask = draft.request.mask(draft.tokens)
    for i, token_id in enumerate(proposed):
        if mask is not None:
            if not mask.allows(token_id):
                break
            mask.push(token_id)
        copied = DraftToken(LOOKUP, support=support + i, agreed=agreed, contested=contested and i == 0)
        if draft.add(token_id, copied) is not DraftDecision.MORE:
            break
