"""Drafts by a small language model with the target's vocabulary, computed for all sessions in packed steps.

The model chooses from its own logits with the session's noise, the same noise that the target's choice is made with, so
that both often choose the same token at any temperature (`shared.sampling.sampler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from services.drafter.control import DraftDecision, DraftToken
from services.drafter.core.draft import Draft, DraftRequest, WithoutStates
from services.drafter.sources.registry import MODEL
from services.drafter.sources.statistics import Statistics, draft_tokens
from shared.engine import Engine, Step
from shared.errors import EngineError
from shared.sampling.rules import LogitsProcessor
from shared.sampling.sampler import choose


class ModelDrafts(WithoutStates):
    """A draft model on its own engine."""

    blocking = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Draft for all sessions, one packed step per position.

        Requests that do not fit into the cache together are drafted in parts. A draft ends where the cache is full.
        """
        drafts = [Draft() for _ in requests]
        try:
            self._draft(requests, drafts)
        except EngineError:
            # Split only before the first step: tokens that were added to the rounds stay in them.
            if len(requests) > 1 and not any(draft.steps for draft in drafts):
                half = len(requests) // 2
                return self.propose(requests[:half]) + self.propose(requests[half:])
        return drafts

    def _draft(self, requests: Sequence[DraftRequest], drafts: list[Draft]) -> None:
        steps: dict[int, Step] = {}
        for i, request in enumerate(requests):
            if request.round.wants(MODEL):
                held = min(self._engine.attach(request.session_id, request.tokens), len(request.tokens) - 1)
                self._engine.truncate(request.session_id, held)
                steps[i] = Step(request.session_id, request.tokens[held:], rows=1)
        processors = {
            i: LogitsProcessor.of(requests[i].sampling, requests[i].tokens, requests[i].mask()) for i in steps
        }
        while steps:
            logits = self._engine.forward(list(steps.values())).logits
            chosen = choose(
                logits,
                [requests[i].sampling for i in steps],
                [len(requests[i].tokens) + len(drafts[i].tokens) for i in steps],
                [processors[i] for i in steps],
            )
            tokens = _draft_tokens(logits, chosen)
            following: dict[int, Step] = {}
            for i, token_id, token in zip(steps, chosen, tokens, strict=True):
                drafts[i].steps[MODEL] = drafts[i].steps.get(MODEL, 0) + 1
                decision = requests[i].round.add(token)
                if decision is DraftDecision.DROP:
                    drafts[i] = replace(drafts[i], dropped=token_id)
                else:
                    drafts[i].tokens.append(token_id)
                if decision is DraftDecision.MORE:
                    if (processor := processors[i]) is not None:
                        processor.push(token_id)
                    following[i] = Step(requests[i].session_id, [token_id], rows=1)
            steps = following

    def close(self, session_id: str) -> None:
        """Free the session's cache."""
        self._engine.release(session_id)


def _draft_tokens(logits: Tensor, chosen: list[int]) -> list[DraftToken]:
    """Return the statistics of the tokens chosen from logits (rows, vocabulary), on the device where the logits are."""
    if logits.device.type == "cpu":
        return draft_tokens(MODEL, logits.float().numpy(), chosen)
    return [DraftToken(MODEL, *row) for row in _statistics_on_device(logits.float(), torch.tensor(chosen))]


def _statistics_on_device(logits: Tensor, columns: Tensor) -> list[Statistics]:
    """`row_statistics` of each row of logits on an accelerator, which stay there. columns: (rows,)."""
    shares = torch.softmax(logits, -1)
    confidence = shares.gather(1, columns[:, None].to(shares.device))[:, 0]
    entropy = torch.logsumexp(logits, -1) - (shares * logits).sum(-1)
    best = shares.topk(min(2, shares.shape[1]), -1).values
    parts = (confidence, entropy, best[:, 0] - best[:, -1], logits.std(-1))
    return list(zip(*(part.tolist() for part in parts), strict=True))
