"""Prompts of about a wanted length, made of the packaged corpus. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.tools.training.prompts import CorpusPrompt, Turn, sample

CHARACTERS_PER_TOKEN = 4.2
"""Of the corpus with the default target's tokenizer: 3.4 (mathematics) to 4.8."""
CANDIDATES = 12
NOTES_KIND = "summary"
"""Its prompts hold passages."""
CHARACTERS_PER_NOTE = 300
"""The shortest ones."""
NEAR = 0.75
"""A prompt of this share of the wanted length is long enough; one that is longer by as much fits."""
NUMBERS = 1_000_000

Messages = list[dict[str, str]]


def conversation(seed: int, tokens: float, kinds: Sequence[str], held_out: bool) -> Messages:
    """A conversation of about so many tokens, the same for the same arguments.

    Of some prompts the longest that fits; what it lacks is made up by notes before its last question. It begins
    with a number of its own, so that no prefix cache knows it: short prompts of the corpus come again now and then.
    """
    wanted = tokens * CHARACTERS_PER_TOKEN
    candidates = sample(seed, CANDIDATES, held_out, kinds)
    fitting = [prompt for prompt in candidates if _length(prompt) <= wanted / NEAR]
    best = max(fitting, key=_length) if fitting else min(candidates, key=_length)
    turns = list(best.turns or ())
    if (lacking := round(wanted - _length(best))) > (1 - NEAR) * wanted:
        asked = turns.pop()
        turns.append(Turn(asked.role, f"{_notes(seed, lacking, held_out)}\n\n{asked.content}"))
    turns[0] = Turn(turns[0].role, f"(No. {seed % NUMBERS}) {turns[0].content}")
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _length(prompt: CorpusPrompt) -> int:
    return sum(len(turn.content) for turn in prompt.turns or ())


def _notes(seed: int, characters: int, held_out: bool) -> str:
    """Passages, up to a word's end at `characters`."""
    passages = sample(seed + 1, 1 + characters // CHARACTERS_PER_NOTE, held_out, [NOTES_KIND])
    text = "\n\n".join(turn.content for prompt in passages for turn in prompt.turns or () if turn.role == "user")
    return text[:characters].rpartition(" ")[0]
