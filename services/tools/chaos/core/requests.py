"""What is asked while things fail: drawn from a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.messages import Sampling

WORDS = """
the a river mountain engine letter silver quickly sings under over because seven tokens verify draft city of and when
light runs paper garden never opens story number blue forgets window between home again
"""
OPENINGS = (
    "Explain in a few words:",
    "Repeat this three times:",
    "Continue the story:",
    "Write a list about",
    "Translate: 你好, 🙂, naïve,",
    "Summarise:",
)


class Manner(StrEnum):
    """How a client takes its answer."""

    STREAM = "stream"
    WHOLE = "whole"
    SLOW = "slow reader"
    LEAVES = "leaves early"


@dataclass(frozen=True)
class Question:
    """A prompt and how its answer is chosen; its text is the beginning of one text, however long it may be."""

    number: int
    prompt: str
    sampling: Sampling


@dataclass(frozen=True)
class Request:
    """One request of one client."""

    name: str
    question: Question
    manner: Manner
    chat: bool
    """Asked as a chat; else as a completion of the same tokens."""
    max_tokens: int
    draft: str
    leaves_after: int
    """Events after which a client that leaves early goes away."""
    gateway: float
    """Which gateway is asked first: a share of their number, from 0 to 1."""
    resumable: bool
    """Its stream may be left and gone on with elsewhere, without a gateway's failing."""


@dataclass(frozen=True)
class Load:
    """Who asks what."""

    seed: int
    questions: Sequence[Question]
    longest: int
    """Most output tokens."""

    def request(self, client: int, number: int) -> Request:
        """A client's request of this number."""
        draw = random.Random(f"request-{self.seed}-{client}-{number}")
        manner = draw.choices(tuple(Manner), (6, 2, 1, 1))[0]
        return Request(
            name=f"c{client}.{number}",
            question=draw.choice(self.questions),
            manner=manner,
            chat=draw.random() < 0.5,
            max_tokens=draw.randint(max(1, self.longest // 4), self.longest),
            draft=draw.choice(("auto", "auto", "lookup", "none")),
            leaves_after=draw.randint(1, 6),
            gateway=draw.random(),
            resumable=manner is not Manner.LEAVES and draw.random() < 0.5,
        )


def load(seed: int, questions: int, longest: int) -> Load:
    """`questions` different ones, with prompts of 5 to 120 words, half of them sampled."""
    draw = random.Random(f"questions-{seed}")
    made = []
    for number in range(questions):
        words = " ".join(draw.choices(WORDS.split(), k=draw.choice((5, 12, 30, 60, 120))))
        sampling = Sampling()
        if number % 2:
            sampling = Sampling(
                temperature=draw.choice((0.7, 1.0)),
                top_p=draw.choice((1.0, 0.9)),
                top_k=draw.choice((0, 50)),
                seed=draw.randrange(-(2**63), 2**63),
            )
        made.append(Question(number, f"{draw.choice(OPENINGS)} {words}", sampling))
    return Load(seed, made, longest)
