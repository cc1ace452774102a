"""Prompts of about a given length, from the packaged corpus."""

from __future__ import annotations

from collections.abc import Sequence

from services.tools.training.prompts import CorpusPrompt, Turn, sample

CHARACTERS_PER_TOKEN = 4.2
"""Mean of the corpus with the default target's tokenizer; by kind from 3.4 (mathematics) to 4.8."""
CANDIDATES = 12
NOTES_KIND = "summary"
"""Kind of text whose prompts contain passages."""
CHARACTERS_PER_NOTE = 300
"""Length of the shortest passages."""
NEAR = 0.75
"""A prompt is long enough from this share of the wanted length on, and fits up to the inverse of it."""
NUMBERS = 1_000_000

Messages = list[dict[str, str]]


def conversation(seed: int, tokens: float, kinds: Sequence[str], held_out: bool) -> Messages:
    """Return a conversation of about `tokens` tokens, the same for the same arguments.

    It is the longest fitting prompt among some candidates. If that is too short, notes before its last question fill
    it up. It begins with a number of its own, so that no prefix cache holds it: short prompts of the corpus repeat.
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
    """Return passages of up to `characters` characters, cut at the end of a word."""
    passages = sample(seed + 1, 1 + characters // CHARACTERS_PER_NOTE, held_out, [NOTES_KIND])
    text = "\n\n".join(turn.content for prompt in passages for turn in prompt.turns or () if turn.role == "user")
    return text[:characters].rpartition(" ")[0]
