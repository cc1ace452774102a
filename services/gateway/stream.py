"""Response bodies: OpenAI's response objects, stream chunks and server-sent events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.gateway.answer import Answer, AnswerForm, Usage
from services.gateway.core.completion import CompletionRound, CompletionTally, Piece, Token
from services.gateway.core.slo import SloOutcome
from services.gateway.errors import encode
from shared.messages import Slo

DONE = b"data: [DONE]\n\n"

Fields = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One complete completion of an answer."""

    text: str
    finish: str


@dataclass(frozen=True)
class Chunks:
    """Makes the chunks of one streamed answer, or its whole response object."""

    answer_id: str
    fingerprint: str
    form: AnswerForm

    @classmethod
    def of(cls, answer: Answer) -> Chunks:
        """Return the chunks of an answer whose sessions are known."""
        return cls(answer.answer_id, answer.sessions[0].fingerprint, answer.form)

    def opening(self, index: int) -> Fields | None:
        """Return the first chunk of a chat completion, which names the role; None for text completions."""
        if not self.form.chat:
            return None
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""}, None)])

    def delta(self, index: int, text: str) -> Fields:
        """Return a chunk with more text."""
        return self._chunk([self._choice(index, {"content": text} if self.form.chat else text, None)])

    def closing(self, index: int, finish: str) -> Fields:
        """Return the last chunk of a completion."""
        return self._chunk([self._choice(index, {} if self.form.chat else "", finish)])

    def usage(self, usage: Usage) -> Fields:
        """Return the extra chunk at the end of a stream whose request asked for usage."""
        return {**self._chunk([]), "usage": usage_fields(usage)}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Fields:
        """Return the response to a request that is not streamed."""
        made: list[Fields] = []
        for index, choice in enumerate(choices):
            content: Fields = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.form.chat
                else {"text": choice.text}
            )
            made.append({"index": index, **content, "logprobs": None, "finish_reason": choice.finish})
        return {**self._common("chat.completion"), "choices": made, "usage": usage_fields(usage)}

    def _choice(self, index: int, content: Fields | str, finish: str | None) -> Fields:
        return {
            "index": index,
            "delta" if self.form.chat else "text": content,
            "logprobs": None,
            "finish_reason": finish,
        }

    def _chunk(self, choices: list[Fields]) -> Fields:
        fields = {**self._common("chat.completion.chunk"), "choices": choices}
        if self.form.include_usage:
            fields["usage"] = None
        return fields

    def _common(self, chat_object: str) -> Fields:
        fields: Fields = {
            "id": self.answer_id,
            "object": chat_object if self.form.chat else "text_completion",
            "created": self.form.created,
            "model": self.form.model,
            "system_fingerprint": f"fp_{self.fingerprint[:16]}",
        }
        if self.form.service_tier is not None:
            fields["service_tier"] = self.form.service_tier
        return fields


def usage_fields(usage: Usage) -> Fields:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total,
    }


def event(fields: Fields, cursor: object = None) -> bytes:
    """Encode a server-sent event. Its id is the stream cursor after the event."""
    return (b"" if cursor is None else b"id: %s\n" % str(cursor).encode()) + b"data: " + encode(fields) + b"\n\n"


def trace(piece: Piece) -> Fields:
    """Return the trace of one chunk: its tokens, the round of the last token, and the rounds since the last chunk."""
    return {"tokens": tokens(piece.tokens), "round": piece.round, "rounds": rounds(piece.rounds)}


def rounds(settled: Sequence[CompletionRound]) -> list[Fields]:
    """Return rounds as the trace shows them."""
    return [
        {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(one).items()}
        for one in settled
    ]


def tokens(made: Sequence[Token]) -> list[Fields]:
    """Return tokens as the trace shows them."""
    return [{"id": token.id, "text": token.text, "draft": token.draft} for token in made]


def summary(
    tallies: Sequence[CompletionTally],
    outcomes: Sequence[SloOutcome],
    ttft_ms: float,
    total_ms: float,
    *,
    service_class: str,
    slo: Slo | None,
) -> Fields:
    """Return the trace's summary of a request: its SLO, its speed and its costs.

    Messaging time is the total minus drafting, queueing and verifying. Times are summed over completions, which run
    side by side, so messaging time is meaningful for a single completion only. A request attains its SLO if all its
    completions do; its time per output token is that of the slowest.
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


_COUNTS = ("rounds", "tokens", "drafted", "verified", "accepted", "run_tokens")
