"""The engine of a twin whose steps are computed: by a model of random weights, whose answers are not used.

So the time of a step is that of a real target on this machine's accelerator, and answers and accepted drafts are those
of the twin's trace. Random weights would accept no draft, and their time is that of trained ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.engine import Engine, Step
from shared.engine.engine import Output
from shared.engine.steps import ChoiceRow
from shared.errors import EngineError, ModelError
from shared.messages.logprobs import TokenLogprob
from shared.models.folder import ModelFolder
from shared.twin.engine import NO_LOGPROBS, STATE_SIZE, answers_at, twin_states
from shared.twin.folder import TwinFolder
from shared.twin.text import SyntheticText
from shared.twin.trace import TraceText


@dataclass(frozen=True, slots=True)
class ComputedOutput(Output):
    """The answers at the rows of a step, beside the logits that nobody uses."""

    text: SyntheticText | TraceText

    def choose(self, rows: Sequence[ChoiceRow]) -> list[int]:
        """Return the twin's token for each of these rows, after the model's choice, which takes its time."""
        Output.choose(self, rows)
        return answers_at(self.text, rows)

    def logprobs(self, rows: slice, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
        """Raise EngineError: the logits are not those of the answers."""
        raise EngineError(NO_LOGPROBS)

    def bits(self, rows: slice) -> bytes:
        """Return nothing: the logits are not those of the answers."""
        return b""


class ComputedTwinEngine(Engine):
    """The engine of the model that a twin's folder names, with the twin's answers and hidden states."""

    has_logits = False

    def __init__(self, folder: Path, **options: Any) -> None:
        """folder: a twin's. options: those of `Engine`. Raises ModelError, EngineError and SettingsError."""
        twin, described = TwinFolder.open(folder), ModelFolder(folder)
        computed = Path(twin.spec.computed or "")
        if twin.spec.computed is None or not (computed / "config.json").is_file():
            raise ModelError(f"{folder} is a twin whose steps {computed} computes, which is gone; make the twin again")
        super().__init__(computed, **options)
        if described.vocab_size > self.vocab_size:
            raise ModelError(
                f"{computed} has a vocabulary of {self.vocab_size} tokens, and the twin {folder} answers with "
                f"{described.vocab_size}; make the twin with a model of at least as many"
            )
        self._text = twin.text()
        self.hidden_size = STATE_SIZE
        self.max_len = min(self.max_len, described.max_len)

    @property
    def keeps_hidden(self) -> bool:
        """True: a twin has hidden states of one element, also where those of the model are not kept."""
        return True

    def hidden_bits(self, session_id: str, start: int, stop: int) -> NDArray[np.uint16]:
        """Return hidden states of one element, as far as the session is cached."""
        return twin_states(self.cached(session_id), start, stop)

    def forward(self, steps: Sequence[Step]) -> ComputedOutput:
        """Compute all steps in one pass, as `Engine` does, and return the twin's answers."""
        computed = super().forward(steps)
        return ComputedOutput(computed.logits, computed.offsets, self._text)
