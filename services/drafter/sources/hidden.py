"""Drafts by a model that reads the target's hidden states, all sessions in packed steps; copies beside it, if wanted.

A request that names lookup too knows what that would copy: where both propose the same token, it is likelier to be
accepted, and what follows it is copied as far as the controller goes; where they differ, the likelier of the two by the
controller's estimate is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from services.drafter.control import Guess, Step
from services.drafter.core.draft import Ahead, Draft, DraftRequest
from services.drafter.core.lookup import NAME as COPY
from services.drafter.core.lookup import NgramIndex
from services.drafter.hidden.engine import DraftEngine, DraftStep
from services.drafter.sources.guesses import guesses
from shared.errors import EngineError
from shared.sampling.sampler import Columns, choose

NAME = "hidden"


@dataclass
class _Session:
    """What is kept of a session between calls."""

    seen: int = 0
    """Tokens computed with the target's own states; what the engine holds beyond them is built on estimates."""
    latest: Tensor | None = None
    """The model's estimate at the last token that the engine holds: (hidden size,)."""
    index: NgramIndex = field(default_factory=NgramIndex)


@dataclass
class _Drafting:
    """A draft in the making."""

    request: DraftRequest
    state: _Session
    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    computed: int = 0

    @property
    def position(self) -> int:
        """Of the token to be drafted next."""
        return len(self.request.tokens) + len(self.tokens)

    @property
    def copies(self) -> bool:
        return COPY in self.request.names

    def copy(self) -> tuple[int, int] | None:
        """The token that lookup would copy next, and the length of the n-gram that it followed."""
        if not self.copies:
            return None
        proposed, support = self.state.index.continuation(self.request.tokens, 1, self.tokens)
        return (proposed[0], support) if proposed else None

    def step(self, token: int) -> DraftStep:
        """The step that computes `token` after all that the engine holds."""
        assert self.state.latest is not None
        return DraftStep(self.request.session, [token], self.state.latest.float()[None])

    def made(self) -> Draft:
        return Draft(self.tokens, {NAME: self.steps} if self.steps else {}, self.computed)


class HiddenDrafts:
    """The draft model on its engine."""

    blocking = True

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self._columns = Columns.of(engine.head_ids.numpy())
        self._sessions: dict[str, _Session] = {}

    def seen(self, session: str) -> int:
        """Tokens computed with the target's own states and still held."""
        known = self._sessions.get(session)
        return 0 if known is None else min(known.seen, self._engine.length(session))

    def close(self, session: str) -> None:
        """Free the session's cache."""
        self._sessions.pop(session, None)
        self._engine.release(session)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Draft for all sessions, one packed step per position; one that lacks states, or room, gets copies or none."""
        drafts = [_Drafting(request, self._sessions.setdefault(request.session, _Session())) for request in requests]
        steps: dict[int, DraftStep] = {}
        for i, draft in enumerate(drafts):
            request = draft.request
            if draft.copies:
                draft.state.index.extend(request.tokens)
            if request.round.wants(NAME) and (step := self._catch_up(draft)) is not None:
                steps[i] = step
        computed = self._forward(drafts, steps)
        for i, draft in enumerate(drafts):
            if i in computed:
                draft.state.seen = len(draft.request.tokens)
                draft.computed = len(steps[i].tokens)
            elif draft.copies and draft.request.round.wants(COPY):
                _copy(draft, agreed=False)
        self._draft(drafts, computed)
        return [draft.made() for draft in drafts]

    def ahead(self, requests: Sequence[tuple[DraftRequest, Draft]]) -> list[Ahead | None]:
        """Go on from each draft: the token that should follow it, and a draft after that one."""
        drafts = [
            _Drafting(
                replace(request, tokens=[*request.tokens, *made.tokens]),
                self._sessions.get(request.session, _Session()),
            )
            for request, made in requests
        ]
        alive = {i for i, (request, _) in enumerate(requests) if self.seen(request.session) == len(request.tokens)}
        while behind := {i: step for i in alive if (step := self._behind(drafts[i])) is not None}:
            alive -= behind.keys() - self._forward(drafts, behind)
        bonus = dict(zip(sorted(alive), self._choose([drafts[i] for i in sorted(alive)])[0], strict=True))
        for i, token in bonus.items():
            drafts[i].request = replace(drafts[i].request, tokens=[*drafts[i].request.tokens, token])
        wanting = {i: drafts[i].step(token) for i, token in bonus.items() if drafts[i].request.round.wants(NAME)}
        self._draft(drafts, self._forward(drafts, wanting))
        return [Ahead(bonus[i], draft.made()) if i in bonus else None for i, draft in enumerate(drafts)]

    def _catch_up(self, draft: _Drafting) -> DraftStep | None:
        """The step that computes all committed tokens not computed yet; None if their states are not all there."""
        request = draft.request
        count = len(request.tokens)
        self._engine.open(request.session)
        seen = min(self.seen(request.session), count - 1)
        draft.state.seen = seen
        self._engine.truncate(request.session, seen)
        states = request.states
        needed = max(0, seen - 1)
        if states is None or states.start > needed or states.start + len(states.rows) != count - 1:
            return None
        before = torch.from_numpy(states.rows[needed - states.start :])
        if seen == 0:  # nothing is before the first token
            before = torch.cat([before.new_zeros(1, self._engine.hidden_size), before])
        return DraftStep(request.session, request.tokens[seen:], before)

    def _behind(self, draft: _Drafting) -> DraftStep | None:
        """The step for the first token that the engine does not hold."""
        held = self._engine.length(draft.request.session)
        return draft.step(draft.request.tokens[held]) if held < len(draft.request.tokens) else None

    def _forward(self, drafts: Sequence[_Drafting], steps: dict[int, DraftStep]) -> list[int]:
        """Compute steps, keyed by index into `drafts`; the indices of those that could be computed.

        An estimate that is no number (a target's broken states) counts as not computed: others' drafts go on.
        """
        if not steps:
            return []
        try:
            estimates = self._engine.forward(list(steps.values()))
        except EngineError:
            # Too many at once, or a session too long for the cache: fewer, and in the end none, get a draft.
            if len(steps) == 1:
                return []
            items = list(steps.items())
            half = len(items) // 2
            return self._forward(drafts, dict(items[:half])) + self._forward(drafts, dict(items[half:]))
        sound = [i for i, finite in zip(steps, estimates.isfinite().all(-1).tolist(), strict=True) if finite]
        for i, estimate in zip(steps, estimates, strict=True):
            drafts[i].state.latest = estimate
        return sound

    def _draft(self, drafts: Sequence[_Drafting], going: Sequence[int]) -> None:
        """Draft one token after the other while the rounds want more. `going`: whose last token has been computed."""
        while going := [i for i in going if drafts[i].request.round.wants(NAME)]:
            tokens, told = self._choose([drafts[i] for i in going])
            steps: dict[int, DraftStep] = {}
            for i, token, guess in zip(going, tokens, told, strict=True):
                draft = drafts[i]
                draft.steps += 1
                weighed = _weigh(draft, token, guess)
                if weighed is None:
                    continue
                verdict = draft.request.round.add(weighed)
                if verdict is not Step.DROP:
                    draft.tokens.append(token)
                if verdict is Step.MORE:
                    steps[i] = draft.step(token)
            going = self._forward(drafts, steps)

    def _choose(self, drafts: Sequence[_Drafting]) -> tuple[list[int], list[Guess]]:
        """The model's next token for each, and what it knows of it."""
        if not drafts:
            return [], []
        logits = self._engine.logits(torch.stack([d.state.latest for d in drafts if d.state.latest is not None]))
        chosen = choose(logits, [d.request.sampling for d in drafts], [d.position for d in drafts], self._columns)
        return chosen, guesses(NAME, logits, torch.from_numpy(self._columns.ids.searchsorted(chosen)))


def _weigh(draft: _Drafting, token: int, guess: Guess) -> Guess | None:
    """Hold the model's token against what lookup would copy: the guess to add, or None if copying went on instead."""
    if (found := draft.copy()) is None:
        return guess
    copied, support = found
    if copied == token:
        _copy(draft, agreed=True)
        return None
    contested = replace(guess, contested=True)
    round_ = draft.request.round
    if round_.estimate(Guess(COPY, support=support, contested=True)) <= round_.estimate(contested):
        return contested
    _copy(draft, agreed=False, contested=True)
    return None


def _copy(draft: _Drafting, *, agreed: bool, contested: bool = False) -> None:
    """Copy as far as the controller goes. agreed, contested: what the model says of the first of these tokens."""
    round_ = draft.request.round
    room = round_.longest - len(draft.tokens)
    proposed, support = draft.state.index.continuation(draft.request.tokens, room, draft.tokens)
    for i, token in enumerate(proposed):
        verdict = round_.add(Guess(COPY, support=support, agreed=agreed, contested=contested and i == 0))
        if verdict is not Step.DROP:
            draft.tokens.append(token)
        if verdict is not Step.MORE:
            break
