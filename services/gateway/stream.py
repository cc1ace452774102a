"""The shapes of answers: OpenAI's response objects and stream chunks, and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.gateway.core.completion import Piece, Round, Tally, Token
from services.gateway.core.slo import Outcome
from shared.messages import Slo

DONE = b"data: [DONE]\n\n"

Fields = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Token counts of a request; each prompt counts once, however many texts it got."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens

    def fields(self) -> Fields:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total,
        }


@dataclass(frozen=True)
class Text:
    """One complete text of an answer."""

    text: str
    finish: str


@dataclass(frozen=True)
class Reply:
    """What all chunks of an answer, or the whole answer, have in common."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool
    include_usage: bool = False
    service_tier: str | None = None
    """The class that serves the request, where it asked for a tier."""

    def opening(self, index: int) -> Fields | None:
        """The first chunk of a chat's text, which names the role; completions have none."""
        if not self.chat:
            return None
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""}, None)])

    def delta(self, index: int, text: str) -> Fields:
        """A chunk with more text."""
        return self._chunk([self._choice(index, {"content": text} if self.chat else text, None)])

    def closing(self, index: int, finish: str) -> Fields:
        """The last chunk of a text."""
        return self._chunk([self._choice(index, {} if self.chat else "", finish)])

    def usage(self, usage: Usage) -> Fields:
        """The extra chunk at the end of a stream whose request asked for usage."""
        return {**self._chunk([]), "usage": usage.fields()}

    def whole(self, texts: Sequence[Text], usage: Usage) -> Fields:
        """The answer to a request that is not streamed."""
        choices: list[Fields] = []
        for index, text in enumerate(texts):
            content: Fields = (
                {"message": {"role": "assistant", "content": text.text, "refusal": None}}
                if self.chat
                else {"text": text.text}
            )
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": text.finish})
        return {**self._common("chat.completion"), "choices": choices, "usage": usage.fields()}

    def _choice(self, index: int, content: Fields | str, finish: str | None) -> Fields:
        return {
            "index": index,
            "delta" if self.chat else "text": content,
            "logprobs": None,
            "finish_reason": finish,
        }

    def _chunk(self, choices: list[Fields]) -> Fields:
        fields = {**self._common("chat.completion.chunk"), "choices": choices}
        if self.include_usage:
            fields["usage"] = None
        return fields

    def _common(self, chat_object: str) -> Fields:
        fields: Fields = {
            "id": self.id,
            "object": chat_object if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        if self.service_tier is not None:
            fields["service_tier"] = self.service_tier
        return fields


def encode(fields: Fields) -> bytes:
    """JSON in UTF-8, in one line also for clients that break lines at Unicode's rarer line ends."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, escape in (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(character, escape)
    return text.encode()


def event(fields: Fields, place: object = None) -> bytes:
    """One server-sent event; its id says how far the client has the stream with it."""
    return (b"" if place is None else b"id: %s\n" % str(place).encode()) + b"data: " + encode(fields) + b"\n\n"


def trace(piece: Piece) -> Fields:
    """The trace of one chunk: the tokens that its text is made of, the round that the last of them came with, and what
    each round since the last chunk brought and cost."""
    return {"tokens": tokens(piece.tokens), "round": piece.round, "rounds": rounds(piece.rounds)}


def rounds(settled: Sequence[Round]) -> list[Fields]:
    """Rounds as the trace shows them."""
    return [
        {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(one).items()}
        for one in settled
    ]


def tokens(made: Sequence[Token]) -> list[Fields]:
    """Tokens as the trace shows them."""
    return [{"id": token.id, "text": token.text, "draft": token.draft} for token in made]


def summary(
    tallies: Sequence[Tally],
    outcomes: Sequence[Outcome],
    ttft_ms: float,
    total_ms: float,
    *,
    service_class: str,
    slo: Slo | None,
) -> Fields:
    """What a request was promised, how fast it came, and what it cost. Messaging is what remains of its time after
    drafting, queueing and verifying.

    Sums over a request's texts; as these run side by side, messaging is meaningful for a single text only. A request
    of several texts attains if all of them do, and its time per output token is that of the slowest.
    """
    tpots_ms = [outcome.tpot_ms for outcome in outcomes if outcome.tpot_ms is not None]
    work = {name: sum(getattr(t, name) for t in tallies) for name in ("draft_ms", "queue_ms", "verify_ms")}
    return {
        **{name: sum(getattr(t, name) for t in tallies) for name in _COUNTS},
        "service_class": service_class,
        "slo": slo and {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "attained": all(outcome.attained for outcome in outcomes),
        "tpot_ms": None if not tpots_ms else round(max(tpots_ms), 3),
        "ttft_ms": round(ttft_ms, 3),
        "total_ms": round(total_ms, 3),
        **{name: round(value, 3) for name, value in work.items()},
        "messaging_ms": round(max(0.0, total_ms - sum(work.values())), 3),
    }


_COUNTS = ("rounds", "tokens", "drafted", "verified", "accepted")
