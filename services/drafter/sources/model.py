"""Drafts by a small language model with the target's vocabulary, all sessions in packed steps.

It draws with its own logits but the session's own noise, the same that the target's choice is made with, so that the
two often pick the same token at any temperature (`shared.sampling.sampler`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.drafter.control import Step as Verdict
from services.drafter.core.draft import Draft, DraftRequest, WithoutStates
from services.drafter.sources.guesses import guesses
from shared.engine import Engine, Step
from shared.errors import EngineError
from shared.sampling.sampler import choose

NAME = "model"


class ModelDrafts(WithoutStates):
    """A draft model on its own engine."""

    blocking = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Draft for all sessions, one packed step per position; what does not fit at once is drafted in parts, and a
        draft ends where there is no more room."""
        drafts = [Draft() for _ in requests]
        try:
            self._draft(requests, drafts)
        except EngineError:
            # Only from the start: once tokens were added to the rounds, they stay.
            if len(requests) > 1 and not any(draft.steps for draft in drafts):
                half = len(requests) // 2
                return self.propose(requests[:half]) + self.propose(requests[half:])
        return drafts

    def _draft(self, requests: Sequence[DraftRequest], drafts: list[Draft]) -> None:
        steps: dict[int, Step] = {}
        for i, request in enumerate(requests):
            if request.round.wants(NAME):
                held = min(self._engine.attach(request.session, request.tokens), len(request.tokens) - 1)
                self._engine.truncate(request.session, held)
                steps[i] = Step(request.session, request.tokens[held:], rows=1)
        while steps:
            logits = self._engine.forward(list(steps.values())).logits
            chosen = choose(
                logits,
                [requests[i].sampling for i in steps],
                [len(requests[i].tokens) + len(drafts[i].tokens) for i in steps],
            )
            following: dict[int, Step] = {}
            for i, token, guess in zip(steps, chosen, guesses(NAME, logits, torch.tensor(chosen)), strict=True):
                drafts[i].steps[NAME] = drafts[i].steps.get(NAME, 0) + 1
                verdict = requests[i].round.add(guess)
                if verdict is not Verdict.DROP:
                    drafts[i].tokens.append(token)
                if verdict is Verdict.MORE:
                    following[i] = Step(requests[i].session, [token], rows=1)
            steps = following

    def close(self, session: str) -> None:
        """Free the session's cache."""
        self._engine.release(session)
