"""Computes many sessions of one hidden-state draft in packed steps, with a cache like that of the target's engine.

Loads torch only for accelerators, and for more than one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.drafter.hidden.card import HiddenDraftFolder
from services.drafter.hidden.forward import Floats, Weights, draft_pass
from services.drafter.hidden.tensors import HEAD_IDS
from shared.engine.blocks import BlockPool
from shared.errors import EngineError, ModelError
from shared.kernels.cache import PackedBatch
from shared.kernels.layout import BLOCK
from shared.models.folder import ModelFolder

BRANCH_BLOCKS = 2
"""Most blocks of its own that a branch takes: a copy of the one that it continues, and the next one."""


@dataclass(frozen=True)
class DraftStep:
    """New tokens of one session, with the target's state before each of them."""

    session_id: str
    tokens: Sequence[int]
    before: Floats
    """(tokens, hidden size); zeros before a session's first token."""


class DraftEngine:
    """The draft model, the parts of the target that it uses, and its KV cache.

    Not thread-safe: one thread at a time. A session begins empty with `open`, or with another's tokens with `branch`.
    """

    def __init__(
        self,
        draft: HiddenDraftFolder,
        target: ModelFolder,
        *,
        dtype: str = "bfloat16",
        torch_device: str = "cpu",
        threads: int = 1,
        budget_tokens: int = 16384,
    ) -> None:
        """dtype: format of the weights ("bfloat16", "float32", "int8"). budget_tokens: KV budget, rounded down to whole
        blocks. Raises ModelError if draft and target do not fit."""
        if not draft.fits(target):
            raise ModelError(
                f"the draft in {draft.path} was trained for {draft.card.target}, whose vocabulary or hidden size is not"
                f" that of {target.path}; train one with `wisp draft train`, or choose draft source lookup"
            )
        if draft.card.model.vocab_size > target.vocab_size:
            raise ModelError(
                f"the draft in {draft.path} has a vocabulary of {draft.card.model.vocab_size} tokens, and "
                f"{target.path} of {target.vocab_size}; train one with `wisp draft train`"
            )
        self.hidden_size = draft.card.model.layer.hidden_size
        self._pool = BlockPool(max(1, budget_tokens // BLOCK))
        self._pass = draft_pass(
            draft, target, dtype=dtype, torch_device=torch_device, threads=threads, blocks=self._pool.capacity
        )
        self.head_ids: NDArray[np.int64] = self._pass.head_ids
        self._replacements: deque[Callable[[], None]] = deque(maxlen=1)
        """The newest weights that no step has taken into use yet: while nothing is drafted, only they are kept."""

    def replace(self, weights: Weights) -> None:
        """Take other weights of the same shape into use, from the next step on. May be called in any thread.

        Sessions go on with the KV that they have. Raises ModelError if a weight cannot be used.
        """
        weights = {name: weight for name, weight in weights.items() if name != HEAD_IDS}
        self._replacements.append(self._pass.replacement(weights))

    def open(self, session_id: str) -> None:
        """Begin a session; does nothing if it exists."""
        if session_id not in self._pool.sessions:
            self._pool.attach(session_id, [])

    def length(self, session_id: str) -> int:
        """Return the number of the session's tokens whose KV is held; 0 if it is unknown or was evicted."""
        return self._pool.length(session_id)

    def truncate(self, session_id: str, length: int) -> None:
        """Roll a session back to its first `length` tokens."""
        self._pool.truncate(session_id, length)

    @property
    def branch_room(self) -> int:
        """Number of branches that have room without evicting a session."""
        return self._pool.available // BRANCH_BLOCKS

    def branch(self, session_id: str, branch: str, length: int) -> None:
        """Begin another session with the first `length` tokens of one. It shares their KV; `discard` ends it."""
        self._pool.branch(session_id, branch, length)

    def discard(self, session_id: str) -> None:
        """End a session whose KV nothing can use."""
        self._pool.truncate(session_id, 0)
        self._pool.release(session_id)

    def release(self, session_id: str) -> None:
        """End a session and free its KV."""
        self._pool.release(session_id)

    def forward(self, steps: Sequence[DraftStep]) -> Floats:
        """Return estimates of the target's state at the last token of each step: (steps, hidden size).

        Evicts idle sessions if their room is needed. Raises TooLong, CacheFull or EngineError; then no session
        has changed.
        """
        counts = [len(step.tokens) for step in steps]
        if not steps or min(counts) < 1 or any(len(s.before) != n for s, n in zip(steps, counts, strict=True)):
            raise EngineError("every step needs at least one token, and one state for each")
        starts = [self.length(step.session_id) for step in steps]
        growth = self._pool.grow({step.session_id: len(step.tokens) for step in steps})
        try:
            for source, target in growth.copies:
                self._pass.copy_block(source, target)
            estimates = self._compute(steps, starts, counts)
        except BaseException:
            self._pool.undo(growth)
            raise
        for step in steps:
            self._pool.append(step.session_id, step.tokens)
        return estimates

    def _compute(self, steps: Sequence[DraftStep], starts: Sequence[int], counts: Sequence[int]) -> Floats:
        while self._replacements:
            self._replacements.popleft()()
        tokens = [token for step in steps for token in step.tokens]
        before = steps[0].before if len(steps) == 1 else np.concatenate([step.before for step in steps])
        batch = PackedBatch([self._pool.table(step.session_id) for step in steps], starts, counts)
        return self._pass.forward(tokens, before, batch)

    def logits(self, estimates: Floats) -> Floats:
        """Return the logits of the tokens `head_ids`: (rows, tokens)."""
        return self._pass.logits(estimates)
