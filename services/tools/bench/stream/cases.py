"""Requests of the stream benchmark: held-out prompts of the corpus, each at several temperatures."""

from __future__ import annotations

from collections.abc import Sequence

from services.tools.bench.stream.core.speed import Case
from services.tools.cli.ask import Question
from services.tools.training.prompts import CorpusPrompt, corpus, sample
from shared.models.text import Tokenizer


def kinds_of_text() -> list[str]:
    """Return the kinds of text with held-out prompts."""
    return sorted({template.kind for template in corpus().templates.values() if template.held_out is True})


def cases(
    kinds: Sequence[str], prompts: int, temperatures: Sequence[float], seed: int, tokenizer: Tokenizer
) -> list[Case]:
    """Return all cases. Kinds alternate, so that a slow spell of the machine does not affect one kind alone."""
    of_kind = {kind: sample(seed, prompts, held_out=True, kinds=[kind]) for kind in kinds}
    return [
        Case(kind, number, temperature, seed + number, of_kind[kind][number], _ids(of_kind[kind][number], tokenizer))
        for number in range(prompts)
        for temperature in temperatures
        for kind in kinds
    ]


def question(case: Case, max_tokens: int) -> Question:
    """Return the request of a case, without its draft source."""
    return Question(
        case.name,
        prompt=case.prompt.text or "",
        messages=tuple({"role": turn.role, "content": turn.content} for turn in case.prompt.turns or ()),
        max_tokens=max_tokens,
        options={"temperature": case.temperature, "seed": case.seed},
    )


def _ids(prompt: CorpusPrompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    if prompt.turns is None:
        return tuple(tokenizer.encode(prompt.text or ""))
    return tuple(tokenizer.render_chat([{"role": turn.role, "content": turn.content} for turn in prompt.turns]))
