"""Drafting for texts that are known already: rounds as in service, without the target.

The text of a session does not depend on its drafts, so what the target answered once tells of every draft whether it
would have been accepted. Its recorded hidden states arrive as they would from a verifier: none with the prompt, then
those of all committed tokens but the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from services.drafter.control import Controller, DraftRound, SessionControl
from services.drafter.control.records import RoundRecord
from services.drafter.sources import Draft, DraftRequest, DraftSource, States
from services.tools.training.generate import sampling
from services.tools.training.shards import Text
from shared.messages import HiddenFormat, HiddenStates
from shared.models.hidden_states import parts, unpack

TOGETHER = 32
"""Sessions drafted for in one call."""


@dataclass(frozen=True)
class Drafted:
    """One round: what was drafted, and what would have become of it."""

    text: int
    """Index of the text."""
    kind: str
    temperature: float
    sources: tuple[str, ...]
    """Of each kept token."""
    accepted: int
    steps: int
    """Steps of the draft model, those for dropped tokens included."""
    wasted: int
    """Of these, steps for tokens after the first that was wrong."""
    ahead: bool
    """The draft was made while the round before it was in flight."""
    record: RoundRecord
    acceptance: tuple[float, ...]
    """What the controller expected of each kept token."""

    @property
    def kept(self) -> int:
        """Tokens sent."""
        return len(self.sources)


def entropies(texts: Sequence[Text], head: Tensor) -> list[list[float]]:
    """The target's entropy in nats at every position of every text; `head` is (vocabulary, hidden size)."""
    found = []
    with torch.inference_mode():
        for text in texts:
            logits = torch.nn.functional.linear(text.hidden.to(head.dtype), head).float()
            shares = torch.softmax(logits, -1)
            found.append((torch.logsumexp(logits, -1) - (shares * logits).sum(-1)).tolist())
    return found


class _Session:
    """A text being drafted for; `length` tokens of it are committed."""

    def __init__(self, index: int, text: Text, control: SessionControl) -> None:
        self.index = index
        self.name = f"text-{index}"
        self.text = text
        self.tokens: list[int] = text.tokens.tolist()
        self.length = text.prompt_len
        self.control = control
        self.ahead: tuple[list[int], Draft, DraftRound] | None = None
        """The draft for the next round, if the committed tokens are then these."""

    @property
    def room(self) -> int:
        """Longest useful draft."""
        return len(self.tokens) - self.length - 1

    def states(self, seen: int, form: HiddenFormat) -> States | None:
        """What a drafter that has computed `seen` tokens would have been sent by now."""
        if self.length == self.text.prompt_len:
            return None
        start = max(0, seen - 1)
        rows = self.text.hidden[start : self.length - 1]
        if form is HiddenFormat.BFLOAT16:
            return States(start, rows.float().numpy())
        return States(start, np.concatenate([unpack(part) for part in self._sent(rows, start, form)]))

    def _sent(self, rows: Tensor, start: int, form: HiddenFormat) -> Iterator[HiddenStates]:
        for part in parts(rows.contiguous().view(torch.uint16).numpy(), start, form):
            yield HiddenStates(session=self.name, round=0, **vars(part))


def rounds(
    source: DraftSource,
    names: tuple[str, ...],
    controller: Controller,
    texts: Sequence[Text],
    entropy: Sequence[Sequence[float]] | None = None,
    *,
    optimistic: bool = False,
    form: HiddenFormat = HiddenFormat.BFLOAT16,
) -> Iterator[Drafted]:
    """Draft for every text to its end, and judge every round but each text's first, which computes its prompt.

    names: the sources that may be used. entropy: of the target at each position, if the controller is to know it.
    optimistic: draft ahead while a round is in flight, and use that where it fits. form: how the states travel.
    """
    for first in range(0, len(texts), TOGETHER):
        active = [
            _Session(first + i, text, controller.session(*names))
            for i, text in enumerate(texts[first : first + TOGETHER])
            if len(text.tokens) > text.prompt_len + 1
        ]
        while active:
            asked: list[tuple[_Session, DraftRequest]] = []
            kept: list[tuple[_Session, Draft, DraftRound]] = []
            for session in active:
                committed = session.tokens[: session.length]
                ahead, session.ahead = session.ahead, None
                if ahead is not None and ahead[0] == committed and ahead[1].tokens:
                    kept.append((session, *ahead[1:]))
                    continue
                known = entropy[session.index][session.length - 2] if entropy is not None else None
                began = session.control.begin(session.room, session.text.temperature, known)
                parameters = sampling(session.text.origin, session.text.temperature)
                states = session.states(source.seen(session.name), form)
                asked.append((session, DraftRequest(session.name, committed, parameters, began, names, states)))
            proposed = list(zip(asked, source.propose([request for _, request in asked]), strict=True))
            if optimistic:
                _draft_ahead(source, [(session, request, draft) for (session, request), draft in proposed])
            drafted = [(session, draft, request.round, False) for (session, request), draft in proposed]
            for session, draft, began, early in drafted + [(*one, True) for one in kept]:
                judged = _judge(session, began, draft, early)
                if session.length > session.text.prompt_len:
                    yield judged
                session.control.settle(began, judged.kept, judged.accepted)
                session.length += judged.accepted + 1
            for session in active:
                if session.length >= len(session.tokens):
                    source.close(session.name)
            active = [session for session in active if session.length < len(session.tokens)]


def _draft_ahead(source: DraftSource, drafted: Sequence[tuple[_Session, DraftRequest, Draft]]) -> None:
    asked = []
    for session, request, draft in drafted:
        room = session.room - len(draft.tokens) - 1
        if room > 0 and not session.control.decodes_plainly:
            began = session.control.ahead(room, session.text.temperature)
            asked.append((session, (replace(request, round=began, states=None), draft)))
    for (session, (request, draft)), ahead in zip(asked, source.ahead([pair for _, pair in asked]), strict=True):
        if ahead is not None:
            session.ahead = ([*request.tokens, *draft.tokens, ahead.bonus], ahead.draft, request.round)


def _judge(session: _Session, began: DraftRound, draft: Draft, ahead: bool) -> Drafted:
    truth = session.tokens[session.length :]
    accepted = 0
    while accepted < len(draft.tokens) and draft.tokens[accepted] == truth[accepted]:
        accepted += 1
    steps = sum(draft.steps.values())
    # A step that only continued an accepted token was not in vain, whatever it led to: the first wrong token's is not.
    useful = sum(drafted.token.source in draft.steps for drafted in began.drafted[: accepted + 1])
    return Drafted(
        text=session.index,
        kind=session.text.kind,
        temperature=session.text.temperature,
        sources=tuple(token.source for token in began.kept_tokens),
        accepted=accepted,
        steps=steps,
        wasted=max(0, steps - useful),
        ahead=ahead,
        acceptance=tuple(began.acceptance),
        record=began.record(session.name, session.text.kind, began.kept, accepted),
    )


@dataclass(frozen=True)
class Costs:
    """Times in milliseconds: a round without a draft, verifying one more token, a step of the draft model."""

    round_ms: float
    token_ms: float
    step_ms: float


@dataclass(frozen=True)
class Summary:
    """What some rounds come to."""

    rounds: int
    by_position: list[float]
    """Chain acceptance: the share of tokens accepted at each position, of those whose predecessors were."""
    tokens_per_round: float
    accepted_share: float
    """Accepted / sent draft tokens."""
    wasted_share: float
    """Draft model steps for tokens after the first wrong one / all of them."""
    draft_length: float
    speed: float
    """Expected tokens per second against plain decoding, at the given costs."""

    @classmethod
    def of(cls, drafted: Sequence[Drafted], costs: Costs, positions: int = 8) -> Summary:
        """Summarise at least one round."""
        count = len(drafted)
        accepted = sum(d.accepted for d in drafted)
        kept = sum(d.kept for d in drafted)
        steps = sum(d.steps for d in drafted)
        waited = sum(d.steps for d in drafted if not d.ahead)
        by_position = []
        for i in range(positions):
            reached = [d for d in drafted if d.kept > i and d.accepted >= i]
            if not reached:
                break
            by_position.append(sum(d.accepted > i for d in reached) / len(reached))
        spent = count * costs.round_ms + kept * costs.token_ms + waited * costs.step_ms
        return cls(
            rounds=count,
            by_position=by_position,
            tokens_per_round=1 + accepted / count,
            accepted_share=accepted / kept if kept else 0.0,
            wasted_share=sum(d.wasted for d in drafted) / steps if steps else 0.0,
            draft_length=kept / count,
            speed=(accepted + count) * costs.round_ms / spent,
        )
