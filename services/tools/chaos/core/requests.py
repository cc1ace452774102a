"""Requests that clients send while services fail, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.tools.bench.support.words import random_words
from shared.messages import Sampling

OPENINGS = (
    "Explain in a few words:",
    "Repeat this three times:",
    "Continue the story:",
    "Write a list about",
    "Translate: 你好, 🙂, naïve,",
    "Summarise:",
)


class Manner(StrEnum):
    """The way in which a client receives its answer."""

    STREAM = "stream"
    WHOLE = "whole"
    SLOW = "slow reader"
    LEAVES = "leaves early"


@dataclass(frozen=True)
class ChaosQuestion:
    """A prompt and its sampling parameters. A shorter answer is always the beginning of a longer one."""

    number: int
    prompt: str
    sampling: Sampling


@dataclass(frozen=True)
class ChaosRequest:
    """One request of one client."""

    name: str
    question: ChaosQuestion
    manner: Manner
    chat: bool
    """True to send a chat; False to send a completion of the same prompt tokens."""
    max_tokens: int
    draft: str
    leaves_after: int
    """Events after which a client that leaves early disconnects."""
    gateway: float
    """Choice of the first gateway, as a share of their number from 0 to 1."""
    resumable: bool
    """The client may leave the stream and resume it at another gateway, although no gateway failed."""


@dataclass(frozen=True)
class ChaosLoad:
    """The requests of all clients."""

    seed: int
    questions: Sequence[ChaosQuestion]
    longest: int
    """Largest `max_tokens`."""

    def request(self, client: int, number: int) -> ChaosRequest:
        """Return request `number` of a client."""
        draw = random.Random(f"request-{self.seed}-{client}-{number}")
        manner = draw.choices(tuple(Manner), (6, 2, 1, 1))[0]
        return ChaosRequest(
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


def load(seed: int, questions: int, longest: int) -> ChaosLoad:
    """Return requests over `questions` questions with prompts of 5 to 120 words, half of them sampled."""
    draw = random.Random(f"questions-{seed}")
    made = []
    for number in range(questions):
        words = random_words(draw, draw.choice((5, 12, 30, 60, 120)))
        sampling = Sampling()
        if number % 2:
            sampling = Sampling(
                temperature=draw.choice((0.7, 1.0)),
                top_p=draw.choice((1.0, 0.9)),
                top_k=draw.choice((0, 50)),
                seed=draw.randrange(-(2**63), 2**63),
            )
        made.append(ChaosQuestion(number, f"{draw.choice(OPENINGS)} {words}", sampling))
    return ChaosLoad(seed, made, longest)
