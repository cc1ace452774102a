"""Draft models that fit a target: with its vocabulary, or another that covers enough of it. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from services.drafter.core.translation import Side, Translation, coverage
from shared.errors import ModelError
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

SAMPLE = Path(__file__).with_name("sample.txt")
"""Prose, chat, code and data, of which the covered share is measured."""
LEAST_COVERAGE = 0.5
"""With half of the target's tokens out of reach, each draft token is right at most half of the time. Drafts of any
length then make fewer than 1 / (1 - 0.5) = 2 tokens a round, even if the draft model is always right."""


def covered(draft: ModelFolder, target: ModelFolder) -> float | None:
    """Return the share of the target's tokens that drafts can contain; None if the two have one vocabulary.

    Raises ModelError if it is too small, or a tokenizer cannot be used.
    """
    if draft.vocab_fingerprint == target.vocab_fingerprint:
        return None
    share = coverage(Tokenizer(draft), Tokenizer(target), SAMPLE.read_text(encoding="utf-8"))
    if share < LEAST_COVERAGE:
        raise ModelError(
            f"the draft model {draft.path} splits text too differently from the target {target.path}: drafts could "
            f"contain {share:.0%} of the target's tokens, and below {LEAST_COVERAGE:.0%} they cost more than they "
            "bring. Name a draft model with the target's vocabulary or a similar one, or choose draft source lookup."
        )
    return share


def translation(draft: ModelFolder, target: ModelFolder) -> Translation:
    """Return how the draft model's tokens are read as the target's. Raises ModelError."""
    tokenizer = Tokenizer(draft)
    return Translation(_side(draft, tokenizer, tokenizer.encode("")), _side(target, Tokenizer(target), ()))


def _side(folder: ModelFolder, tokenizer: Tokenizer, begin: list[int] | tuple[int, ...]) -> Side:
    return Side(tokenizer, folder.vocab_size, _ends(folder, tokenizer), tuple(begin))


def _ends(folder: ModelFolder, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end a text; first the tokenizer's own, which ends a turn of a conversation."""
    own = tokenizer.special_tokens.get(folder.special_token("eos_token") or "")
    return tuple(sorted(folder.eos_ids, key=lambda token: token != own))
