"""Evaluation of drafts on known texts: the rounds of a service, without the target.

A session's text does not depend on its drafts, so a text that the target generated once decides for every draft whether
it is accepted. The recorded hidden states arrive as from a verifier: none with the prompt, then those of all committed
tokens but the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from services.drafter.control import Controller, DraftRound, SessionControl
from services.drafter.control.records import RoundRecord
from services.drafter.hidden.target_parts import TargetParts
from services.drafter.learning.head_loss import shaped
from services.drafter.sources import AheadRequest, Draft, DraftRequest, DraftSource, PreparedDraft, States
from services.tools.training.generate import sampling
from services.tools.training.shards import GeneratedText
from shared.messages import HiddenFormat, HiddenStates
from shared.models.hidden_states import parts, unpack

TOGETHER = 32
"""Sessions in one call of the draft source."""


@dataclass(frozen=True)
class Drafted:
    """A round: its draft, and how much of it is accepted."""

    text: int
    """Index of the text."""
    kind: str
    temperature: float
    sources: tuple[str, ...]
    """Draft source of each kept token."""
    accepted: int
    steps: int
    """Steps of the draft model, including those for dropped tokens."""
    wasted: int
    """Steps for tokens after the first wrong one."""
    ahead: bool
    """True if the draft was made while the previous round was in flight."""
    record: RoundRecord
    acceptance: tuple[float, ...]
    """Acceptance that the controller predicted for each kept token."""

    @property
    def kept(self) -> int:
        """Number of tokens sent."""
        return len(self.sources)


def entropies(texts: Sequence[GeneratedText], target: TargetParts) -> list[list[float]]:
    """Return the target's entropy in nats at every position of every text."""
    found = []
    with torch.inference_mode():
        for text in texts:
            products = torch.nn.functional.linear(text.hidden.to(target.head), target.head).float()
            logits = shaped(products, target.logits)
            shares = torch.softmax(logits, -1)
            found.append((torch.logsumexp(logits, -1) - (shares * logits).sum(-1)).tolist())
    return found


class _EvaluatedText:
    """A text in evaluation, of which `length` tokens are committed."""

    def __init__(self, index: int, text: GeneratedText, control: SessionControl) -> None:
        self.index = index
        self.name = f"text-{index}"
        self.text = text
        self.tokens: list[int] = text.tokens.tolist()
        self.length = text.prompt_len
        self.control = control
        self.prepared: dict[tuple[int, ...], PreparedDraft] = {}
        """Drafts for the next round, by the tokens that this round brings."""
        self.brought: tuple[int, ...] = ()
        """The tokens that the last round brought."""

    @property
    def room(self) -> int:
        """Length of the longest useful draft."""
        return len(self.tokens) - self.length - 1

    def states(self, first: int, form: HiddenFormat) -> States | None:
        """Return the states that a verifier would have sent by now, for a drafter that computes the tokens from `first`
        on."""
        if self.length == self.text.prompt_len:
            return None
        start = max(0, first - 1)
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
    texts: Sequence[GeneratedText],
    entropy: Sequence[Sequence[float]] | None = None,
    *,
    outcomes: int = 0,
    form: HiddenFormat = HiddenFormat.BFLOAT16,
) -> Iterator[Drafted]:
    """Draft every text to its end; yield every round but each text's first, which computes the prompt.

    names: the sources in use. entropy: the target's at each position, as input of the controller. outcomes: prepare the
    next draft for this many outcomes of each round in flight. form: format in which the states are sent.
    """
    for first in range(0, len(texts), TOGETHER):
        active = [
            _EvaluatedText(first + i, text, controller.session(*names))
            for i, text in enumerate(texts[first : first + TOGETHER])
            if len(text.tokens) > text.prompt_len + 1
        ]
        while active:
            for text, draft, began, ahead in _drafts(source, names, active, entropy, outcomes=outcomes, form=form):
                judged = _judge(text, began, draft, ahead)
                if text.length > text.text.prompt_len:
                    yield judged
                dropped = draft.dropped if judged.accepted == judged.kept else None
                bonus = text.tokens[text.length + judged.accepted]
                text.control.settle(began, judged.kept, judged.accepted, None if dropped is None else dropped == bonus)
                text.brought = tuple(text.tokens[text.length : text.length + judged.accepted + 1])
                text.length += judged.accepted + 1
            for text in active:
                if text.length >= len(text.tokens):
                    source.close(text.name)
            active = [text for text in active if text.length < len(text.tokens)]


def _drafts(
    source: DraftSource,
    names: tuple[str, ...],
    active: Sequence[_EvaluatedText],
    entropy: Sequence[Sequence[float]] | None,
    *,
    outcomes: int,
    form: HiddenFormat,
) -> list[tuple[_EvaluatedText, Draft, DraftRound, bool]]:
    """Return each text's draft, its round, and whether it was made ahead."""
    asked: list[tuple[_EvaluatedText, DraftRequest]] = []
    prepared: list[tuple[_EvaluatedText, DraftRequest, Draft]] = []
    for text in active:
        committed = text.tokens[: text.length]
        parameters = sampling(text.text.origin, text.text.temperature)
        if (ahead := text.prepared.get(text.brought)) is not None:
            prepared.append((text, DraftRequest(text.name, committed, parameters, ahead.round, names), ahead.draft))
            continue
        target_entropy = entropy[text.index][text.length - 2] if entropy is not None else None
        began = text.control.begin(text.room, text.text.temperature, target_entropy)
        states = text.states(source.starts_at(text.name, text.length), form)
        asked.append((text, DraftRequest(text.name, committed, parameters, began, names, states)))
    answers = source.propose([request for _, request in asked])
    proposed = [(text, request, draft) for (text, request), draft in zip(asked, answers, strict=True)]
    if outcomes:
        _prepare(source, [*proposed, *prepared], outcomes, form)
    return [
        (text, draft, request.round, ahead)
        for made, ahead in ((proposed, False), (prepared, True))
        for text, request, draft in made
    ]


def _prepare(
    source: DraftSource,
    flying: Sequence[tuple[_EvaluatedText, DraftRequest, Draft]],
    outcomes: int,
    form: HiddenFormat,
) -> None:
    """Prepare the texts' next drafts, as a drafter does while these are in flight."""
    asked: list[tuple[_EvaluatedText, AheadRequest]] = []
    for text, request, draft in flying:
        text.prepared = {}
        if not text.control.decodes_plainly:
            states = text.states(source.starts_at(text.name, text.length), form)
            begin = partial(_following, text, text.room)
            asked.append((text, AheadRequest(replace(request, states=states), draft, begin, outcomes)))
    for (text, _), found in zip(asked, source.ahead([request for _, request in asked]), strict=True):
        text.prepared = {tuple(one.tokens): one for one in found}


def _following(text: _EvaluatedText, room: int, count: int) -> DraftRound:
    """Return the round after `count` more tokens."""
    return text.control.ahead(max(0, room - count), text.text.temperature, in_flight=True)


def _judge(text: _EvaluatedText, began: DraftRound, draft: Draft, ahead: bool) -> Drafted:
    truth = text.tokens[text.length :]
    accepted = 0
    while accepted < len(draft.tokens) and draft.tokens[accepted] == truth[accepted]:
        accepted += 1
    steps = sum(draft.steps.values())
    # The step that drafts the first wrong token counts as useful: it continues an accepted token.
    useful = sum(drafted.token.source in draft.steps for drafted in began.drafted[: accepted + 1])
    return Drafted(
        text=text.index,
        kind=text.text.kind,
        temperature=text.text.temperature,
        sources=tuple(token.source for token in began.kept_tokens),
        accepted=accepted,
        steps=steps,
        wasted=max(0, steps - useful),
        ahead=ahead,
        acceptance=tuple(began.acceptance),
        record=began.record(text.name, text.text.kind, began.kept, accepted),
    )


@dataclass(frozen=True)
class Costs:
    """Times in milliseconds of a round without a draft, of verifying one more token, and of a draft model step."""

    round_ms: float
    token_ms: float
    step_ms: float


@dataclass(frozen=True)
class Summary:
    """Figures over a set of rounds."""

    rounds: int
    by_position: list[float]
    """Share of tokens accepted at each position, of those whose predecessors were accepted."""
    tokens_per_round: float
    accepted_share: float
    """Accepted draft tokens / sent draft tokens."""
    wasted_share: float
    """Draft model steps for tokens after the first wrong one / all draft model steps."""
    draft_length: float
    speed: float
    """Expected tokens per second / tokens per second of plain decoding, at the given costs."""

    @classmethod
    def of(cls, drafted: Sequence[Drafted], costs: Costs, positions: int = 8) -> Summary:
        """Sum up rounds, at least one."""
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
