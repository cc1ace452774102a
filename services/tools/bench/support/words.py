"""Random English words for prompts whose language does not matter."""

from __future__ import annotations

import random

TEXT = (
    "the a river mountain engine letter silver quickly sings under over because seven tokens verify draft city of and "
    "when light runs paper garden never opens story number blue forgets window between home again"
)
WORDS = TEXT.split()


def random_words(draw: random.Random, count: int) -> str:
    """Return `count` drawn words with spaces between them."""
    return " ".join(draw.choices(WORDS, k=count))
