"""The engine of a twin: the cache of the real engine, steps that take the time of a target profile, and its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared import cost
from shared.engine.blocks import BlockPool
from shared.engine.steps import ChoiceRow, Step
from shared.errors import BadStep, EngineError, TooLong
from shared.kernels.layout import BLOCK
from shared.messages.logprobs import TokenLogprob
from shared.models.folder import ModelFolder
from shared.twin.folder import TwinFolder
from shared.twin.lateness import wait_for_step
from shared.twin.text import SyntheticText
from shared.twin.trace import TraceText

NO_LOGPROBS = "a twin has no log-probabilities: its answers come from no model; leave logprobs out"
STATE_SIZE = 1
"""Elements of a hidden state of a twin."""


def answers_at(text: SyntheticText | TraceText, rows: Sequence[ChoiceRow]) -> list[int]:
    """Return a twin's token for each of these rows."""
    return [text.token(one.sampling.seed, one.position - one.prompt_len) for one in rows]


def twin_states(held: int, start: int, stop: int) -> NDArray[np.uint16]:
    """Return the hidden states of a twin at these positions, as far as a session is cached."""
    return np.zeros((max(0, min(stop, held) - start), STATE_SIZE), np.uint16)


@dataclass(frozen=True)
class TwinOutput:
    """The answers at the rows of a step."""

    text: SyntheticText | TraceText

    def choose(self, rows: Sequence[ChoiceRow]) -> list[int]:
        """Return the target's token for each of these rows."""
        return answers_at(self.text, rows)

    def wait(self) -> None:
        """Do nothing: the step has taken its time."""

    def logprobs(self, rows: slice, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
        """Raise EngineError: there are no logits."""
        raise EngineError(NO_LOGPROBS)

    def bits(self, rows: slice) -> bytes:
        """Return nothing: there are no logits."""
        return b""


class TwinEngine:
    """The part of `shared.engine.Engine` that verifiers and baselines use, without a model.

    The KV cache is the profile's memory. A block's content is one byte, so that its transfer takes no time. Hidden
    states have one element. Not thread-safe.
    """

    module_code_reason = ""
    batch_invariant = True
    has_logits = False
    keeps_hidden = True
    hidden_size = STATE_SIZE
    arithmetic = "twin"
    layout = "twin"
    block_bytes = 1

    def __init__(self, folder: Path) -> None:
        """folder: a twin's. Raises ModelError and SettingsError."""
        twin, model = TwinFolder.open(folder), ModelFolder(folder)
        self.profile = twin.profile
        self.vocab_size, self.max_len = model.vocab_size, model.max_len
        self._text = twin.text()
        self._pool = BlockPool(max(1, self.profile.kv_tokens // BLOCK))
        self.budget_tokens = self._pool.capacity * BLOCK

    @property
    def free_tokens(self) -> int:
        """Room available without evicting a session."""
        return self._pool.available * BLOCK

    @property
    def sessions(self) -> Sequence[str]:
        """Known sessions, least recently used first."""
        return self._pool.sessions

    def cached(self, session_id: str) -> int:
        """Return the number of the session's tokens whose KV is held."""
        return self._pool.length(session_id)

    def attach(self, session_id: str, tokens: Sequence[int]) -> int:
        """Attach a session with its committed tokens; return `cached(session)`."""
        return self._pool.attach(session_id, tokens)

    def truncate(self, session_id: str, length: int) -> None:
        """Roll a session back to its first `length` tokens."""
        self._pool.truncate(session_id, length)

    def release(self, session_id: str) -> None:
        """Drop a session."""
        self._pool.release(session_id)

    def reset(self) -> None:
        """Drop the whole cache."""
        self._pool = BlockPool(self._pool.capacity)

    def integrity(self) -> None:
        """Check the accounting of the cache. Raises AssertionError."""
        self._pool.integrity()

    def has_block(self, name: bytes) -> bool:
        """Return whether the block with this identity is held."""
        return self._pool.indexed(name) is not None

    def block(self, name: bytes) -> bytes | None:
        """Return the content of a block; None if it is not held."""
        return bytes(self.block_bytes) if self.has_block(name) else None

    def adopt(self, name: bytes, content: bytes) -> bool:
        """Add a block of another twin. Returns False if it is held already or has no room. Raises EngineError."""
        if len(content) != self.block_bytes:
            raise EngineError(f"a block of {len(content)} bytes; blocks of a twin have {self.block_bytes}")
        return self._pool.adopt(name) is not None

    def hidden_bits(self, session_id: str, start: int, stop: int) -> NDArray[np.uint16]:
        """Return hidden states of one element, as far as the session is cached."""
        return twin_states(self.cached(session_id), start, stop)

    def forward(self, steps: Sequence[Step]) -> TwinOutput:
        """Keep the KV of all steps, and wait until the time of the pass is over.

        Raises NotAttached, TooLong, CacheFull or BadStep; then no session has changed.
        """
        started_s = time.perf_counter()
        if not steps or len({step.session_id for step in steps}) < len(steps):
            raise BadStep(f"{len(steps)} steps: give at least one, and only one per session")
        for step in steps:
            if not step.tokens or not 0 <= step.rows <= len(step.tokens):
                raise BadStep(f"session {step.session_id}: {step.rows} logit rows of {len(step.tokens)} new tokens")
            if (length := self.cached(step.session_id) + len(step.tokens)) > self.max_len:
                raise TooLong(f"session {step.session_id} would have {length} tokens, the context is {self.max_len}")
        self._pool.grow({step.session_id: len(step.tokens) for step in steps})
        for step in steps:
            self._pool.append(step.session_id, step.tokens)
        shape = cost.shape_of((len(step.tokens), self.cached(step.session_id), step.rows) for step in steps)
        wait_for_step(started_s, self.profile.time_ms(shape))
        return TwinOutput(self._text)
