"""Copies in runs: drafts by prompt lookup that the verifier makes itself, so that they cost no messages.

A step of runs alone verifies, beside a token of each run, those copies that raise its expected tokens per time.
A step with a batch has none: the scheduler has planned it with one token of each run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from services.verifier.core.runs import Run
from services.verifier.core.tasks import VerifyOutcome
from shared import cost
from shared.kernels.layout import BLOCK
from shared.log_odds import SessionOffset, sigmoid
from shared.lookup import LONGEST_MATCH
from shared.messages import BatchShape, CostModel

PRIOR = ((1, 0.2), (2, 0.4), (3, 0.55), (4, 0.8), (8, 0.85), (16, 0.9), (LONGEST_MATCH, 0.95))
"""Acceptance of a copied token after a match of at least so many tokens, in texts of SmolLM2-135M-Instruct."""
PRIOR_TOKENS = 50.0
"""Tokens that the prior weighs as much as."""
MEMORY = 0.998
"""Weight of the tokens so far when another one is learned: a memory of 500 tokens."""


@dataclass(frozen=True)
class ProposedCopy:
    """The tokens that a run may copy next, and how many tokens before them match."""

    tokens: Sequence[int] = ()
    matched: int = 0


@dataclass
class _Learned:
    right: float
    seen: float


@dataclass
class CopyAcceptance:
    """Log odds that a copied token is the target's choice, by the number of matching tokens before it."""

    _learned: list[_Learned] = field(
        default_factory=lambda: [_Learned(PRIOR_TOKENS * share, PRIOR_TOKENS) for _, share in PRIOR]
    )

    def logit(self, matched: int) -> float:
        """Return the log odds after a match of at least one token."""
        learned = self._learned[_group(matched)]
        return math.log(learned.right / (learned.seen - learned.right))

    def learn(self, copy: ProposedCopy, chosen: Sequence[int], offset: SessionOffset) -> None:
        """Learn from the target's choices at the places of a copy, sent or not, up to the first that differs.

        offset: of the copy's session, which learns too.
        """
        for i, (token, choice) in enumerate(zip(copy.tokens, chosen, strict=False)):
            learned = self._learned[_group(copy.matched + i)]
            offset.learn(self.logit(copy.matched + i), token == choice)
            learned.right = MEMORY * learned.right + (token == choice)
            learned.seen = MEMORY * learned.seen + 1
            if token != choice:
                return


def _group(matched: int) -> int:
    return max(i for i, (least, _) in enumerate(PRIOR) if least <= max(1, matched))


class RunCopies:
    """Chooses the copies of the runs' next step, and learns how often copies are right."""

    def __init__(self) -> None:
        self.model: CostModel = cost.FALLBACK
        self._acceptance = CopyAcceptance()

    def propose(self, runs: Sequence[Run], free_tokens: int) -> list[ProposedCopy]:
        """Return the copy that each run may verify in the next step. free_tokens: of the KV cache."""
        copies = [_continuation(run) for run in runs]
        needed = sum(len(copy.tokens) + BLOCK for copy in copies if copy.tokens)
        return copies if needed <= free_tokens else [ProposedCopy()] * len(runs)

    def lengths(self, runs: Sequence[Run], copies: Sequence[ProposedCopy]) -> list[int]:
        """Return how many tokens of each copy are worth verifying."""
        return copy_lengths(self.model, runs, copies, self._acceptance)

    def learn(self, runs: Sequence[Run], copies: Sequence[ProposedCopy], outcomes: Sequence[VerifyOutcome]) -> None:
        """Learn from the outcomes of a step with these copies."""
        for run, copy, outcome in zip(runs, copies, outcomes, strict=True):
            if outcome.verdict is not None:
                self._acceptance.learn(copy, outcome.verdict.tokens, run.copy_offset)


def _continuation(run: Run) -> ProposedCopy:
    task = run.task
    length = min(run.copies, run.left - 1, task.room - 1)
    if length <= 0:
        return ProposedCopy()
    run.text.extend(task.tokens)
    tokens, matched = run.text.continuation(length)
    return ProposedCopy(list(takewhile(lambda token: token not in task.stop_ids, tokens)), matched)


def copy_lengths(
    model: CostModel, runs: Sequence[Run], copies: Sequence[ProposedCopy], acceptance: CopyAcceptance
) -> list[int]:
    """Return how many tokens of each run's copy are worth verifying in the runs' next step.

    The tokens of all copies are taken in the order of their survival, the probability that they and those before them
    are right, as many as bring the most expected tokens per time. The step keeps to the shortest time per token that
    one of several runs was promised.
    """
    survivals = []
    for number, copy in enumerate(copies):
        survival = 1.0
        for i in range(len(copy.tokens)):
            survival *= sigmoid(acceptance.logit(copy.matched + i) + runs[number].copy_offset.value)
            survivals.append((survival, number))
    survivals.sort(key=lambda one: -one[0])
    context = sum(run.length for run in runs)
    limit_ms = min((run.job.tpot_ms for run in runs if run.job.tpot_ms is not None), default=math.inf)
    if len(runs) == 1:
        limit_ms = math.inf
    tokens, taken = float(len(runs)), 0
    best = tokens / _step_ms(model, len(runs), 0, context)
    for count, (survival, _) in enumerate(survivals, 1):
        tokens += survival
        ms = _step_ms(model, len(runs), count, context)
        if ms > limit_ms:
            break
        if tokens / ms > best:
            best, taken = tokens / ms, count
    lengths = [0] * len(runs)
    for _, number in survivals[:taken]:
        lengths[number] += 1
    return lengths


def _step_ms(model: CostModel, runs: int, copied: int, context: int) -> float:
    """Return the predicted time of a step of runs with this many copied tokens. context: of all runs together."""
    new = runs + copied
    shape = BatchShape(jobs=runs, new_tokens=new, new_context=round(context / runs * new), context=context, rows=new)
    return cost.predict_ms(model, shape)
