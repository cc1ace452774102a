"""The right answer to each question, from the bare engine: one session at a time, one token at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.tools.chaos.core.requests import ChaosQuestion
from shared.engine import Engine, Step
from shared.models.folder import ModelFolder
from shared.models.text import Detokenizer, Tokenizer
from shared.sampling.sampler import choose


@dataclass(frozen=True)
class Reference:
    """A question's prompt tokens, and the model's answer."""

    prompt: list[int]
    tokens: list[int]
    """Output tokens, up to and including the stop token if the model emits one within the reference's length."""
    stop_ids: frozenset[int]

    def shown(self, max_tokens: int) -> tuple[list[int], str]:
        """Return the tokens that a client sees with this limit, and the finish reason."""
        tokens = self.tokens[:max_tokens]
        if tokens and tokens[-1] in self.stop_ids:
            return tokens[:-1], "stop"
        return tokens, "length"


class References:
    """The reference answers of one model."""

    def __init__(self, target: Path, questions: Iterable[ChaosQuestion], longest: int, dtype: str = "auto") -> None:
        """longest: most output tokens of an answer."""
        folder = ModelFolder(target)
        self._tokenizer = Tokenizer(folder)
        self._stop_ids = frozenset(folder.eos_ids)
        engine = Engine(target, dtype=folder.resolved(dtype), budget_tokens=4096)
        self.of = {question.number: self._answer(engine, question, longest) for question in questions}
        """Reference by the question's number."""

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of output tokens."""
        detokenizer = Detokenizer(self._tokenizer)
        return detokenizer.feed(tokens) + detokenizer.flush()

    def _answer(self, engine: Engine, question: ChaosQuestion, longest: int) -> Reference:
        prompt = self._tokenizer.render_chat([{"role": "user", "content": question.prompt}])
        tokens = list(prompt)
        engine.attach("reference", tokens)
        while len(tokens) < len(prompt) + longest and (len(tokens) == len(prompt) or tokens[-1] not in self._stop_ids):
            step = Step("reference", tokens[engine.cached("reference") :], rows=1)
            tokens += choose(engine.forward([step]).logits, [question.sampling], [len(tokens)])
        engine.release("reference")
        return Reference(prompt, tokens[len(prompt) :], self._stop_ids)
