"""Drafts by a small language model with the target's vocabulary, all sessions in packed steps.

It draws with its own logits but the session's own noise, the same that the target's choice is made with, so that the
two often pick the same token at any temperature (`shared.sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.drafter.sources.base import Draft, DraftRequest
from shared.engine import Engine, Step
from shared.errors import EngineError
from shared.sampling import choose


class ModelDrafts:
    """A draft model on its own engine."""

    name = "model"
    blocking = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Draft for all sessions, one packed step per position; a session that does not fit gets no draft."""
        drafts = [Draft() for _ in requests]
        try:
            self._draft(requests, drafts)
        except EngineError:
            if len(requests) > 1:
                half = len(requests) // 2
                return self.propose(requests[:half]) + self.propose(requests[half:])
        return drafts

    def _draft(self, requests: Sequence[DraftRequest], drafts: list[Draft]) -> None:
        steps: dict[int, Step] = {}
        for i, request in enumerate(requests):
            if request.length > 0:
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
            confidence = torch.softmax(logits.float(), -1)[range(len(chosen)), chosen].tolist()
            following: dict[int, Step] = {}
            for i, token, probability in zip(steps, chosen, confidence, strict=True):
                drafts[i].tokens.append(token)
                drafts[i].acceptance.append(min(1.0, probability))
                if len(drafts[i].tokens) < requests[i].length:
                    following[i] = Step(requests[i].session, [token], rows=1)
            steps = following

    def learn(self, session: str, drafted: int, accepted: int) -> None:
        """The model's own confidence is its prediction; nothing to learn here."""

    def close(self, session: str) -> None:
        """Free the session's cache."""
        self._engine.release(session)
