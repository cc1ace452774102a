"""What the stream benchmark asks: held-out prompts of the corpus, each at several temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.tools.cli.ask import Question
from services.tools.training.prompts import Prompt, corpus, sample
from shared.models.text import Tokenizer


@dataclass(frozen=True)
class Case:
    """One prompt at one temperature."""

    kind: str
    number: int
    """Which prompt of its kind."""
    temperature: float
    seed: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    """As the gateway tokenizes it."""

    @property
    def name(self) -> str:
        """The case in a few words."""
        return f"{self.kind} {self.number} at temperature {self.temperature:g}"

    def question(self, max_tokens: int) -> Question:
        """The request, without its draft source."""
        turns, text = self.prompt.turns, self.prompt.text
        return Question(
            self.name,
            prompt=text or "",
            messages=tuple({"role": turn.role, "content": turn.content} for turn in turns or ()),
            max_tokens=max_tokens,
            options={"temperature": self.temperature, "seed": self.seed},
        )


def kinds_of_text() -> list[str]:
    """The kinds that the corpus has held-out prompts of."""
    return sorted({template.kind for template in corpus().templates.values() if template.held_out})


def cases(
    kinds: Sequence[str], prompts: int, temperatures: Sequence[float], seed: int, tokenizer: Tokenizer
) -> list[Case]:
    """All cases, kinds in turn, so that a slow spell of the machine spoils none of them alone."""
    of_kind = {kind: sample(seed, prompts, held_out=True, kinds=[kind]) for kind in kinds}
    return [
        Case(kind, number, temperature, seed + number, of_kind[kind][number], _ids(of_kind[kind][number], tokenizer))
        for number in range(prompts)
        for temperature in temperatures
        for kind in kinds
    ]


def _ids(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    if prompt.turns is None:
        return tuple(tokenizer.encode(prompt.text or ""))
    return tuple(tokenizer.render_chat([{"role": turn.role, "content": turn.content} for turn in prompt.turns]))
