"""One text in the making: committed tokens in, from results in any order; pieces of text out.

Results may be repeated, late or lost. Each says at which position its tokens begin, so what is known is skipped; a
result that begins beyond what is known leaves a gap (`gap`), and the missing tokens have to be read from Redis.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.gateway.request import Plan
from shared.messages import Failure, Finish, Result, Status
from shared.models.stop import StopStrings
from shared.models.text import Detokenizer, Tokenizer


@dataclass
class Token:
    """One output token with the text that it completes; a character's first bytes count for the token of its last."""

    id: int
    text: str
    draft: bool
    """True for an accepted draft token, False for the target's own."""


@dataclass
class Round:
    """What one round brought and cost, the chunks of prefill before it included."""

    round: int
    start: int
    """Output tokens before it."""
    tokens: int
    """Tokens that it committed, with the one that ended the text."""
    drafted: int
    verified: int
    accepted: int
    draft_ms: float
    queue_ms: float
    verify_ms: float


@dataclass
class Piece:
    """Text that may be shown, the tokens that it is made of, and the rounds that were settled since the last piece."""

    text: str
    tokens: list[Token]
    round: int
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Tally:
    """What a text cost, over its rounds."""

    rounds: int = 0
    drafts: int = 0
    """Rounds in which a draft was verified."""
    tokens: int = 0
    """Output tokens, without the token that ended the text."""
    drafted: int = 0
    verified: int = 0
    """Draft tokens that were verified: what the scheduler left of those drafted."""
    accepted: int = 0
    draft_ms: float = 0.0
    queue_ms: float = 0.0
    verify_ms: float = 0.0


@dataclass
class Session:
    """State of one text.

    Ends with `finish` (the text is complete) or `failure` (it never will be). `stopped_early` says that a stop string
    ended the text while the session itself goes on: it has to be cancelled.
    """

    prompt_len: int
    stop_ids: frozenset[int]
    detokenizer: Detokenizer
    stops: StopStrings
    echo: str = ""
    """Text that goes before the generated text, with its first piece."""
    length: int = field(init=False)
    """Committed tokens that are known, prompt included."""
    round: int = 0
    gap: bool = False
    finish: Finish | None = None
    failure: Failure | None = None
    stopped_early: bool = False
    tally: Tally = field(default_factory=Tally)
    _ready: deque[Piece] = field(default_factory=deque)
    _held: deque[Token] = field(default_factory=deque)
    """Tokens whose text could still become a stop string, or has not arrived in full."""
    _released: int = 0
    """Characters of the held tokens that are known to be no part of a stop string."""
    _counted: set[tuple[str, int, str]] = field(default_factory=set)
    _rounds: list[Round] = field(default_factory=list)
    _chunks_ms: float = 0.0
    """Time of the chunks of a prompt since the last settled round."""

    def __post_init__(self) -> None:
        self.length = self.prompt_len

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        return self.finish is not None or self.failure is not None

    def result(self, result: Result) -> None:
        """Take in a verifier's result."""
        if self.done:
            return
        if result.status is Status.FAILED:
            self.fail(result.error or Failure(code="failed", message="the verifier gave this session up"))
            return
        self._count(result)
        if result.status is Status.PREFILLED:
            return
        self.round = max(self.round, result.round)
        drafts = result.accepted if result.status is Status.COMMITTED else 0
        self.committed(result.base_len, result.tokens, result.finish, drafts)

    def committed(self, base_len: int, tokens: Sequence[int], finish: Finish | None, drafts: int = 0) -> None:
        """Take in committed tokens from position `base_len` on, the first `drafts` of them accepted drafts.

        `finish` is why the session ended with the last of them.
        """
        if self.done:
            return
        if base_len > self.length:
            self.gap = True
            return
        self.gap = False
        known = self.length - base_len
        shown = ""
        ended = False
        for position, token in enumerate(tokens[known:], start=known):
            self.length += 1
            if token in self.stop_ids:
                finish = finish or Finish.STOP
                ended = True
                break
            text = self.detokenizer.feed([token])
            self.tally.tokens += 1
            self._held.append(Token(token, text, position < drafts))
            safe, hit = self.stops.feed(text)
            shown += safe
            if hit is not None:
                self._stop_early(shown)
                return
        if finish is not None and (ended or base_len + len(tokens) == self.length):
            self._end(finish, shown)
        else:
            self._release(len(shown))

    def fail(self, failure: Failure) -> None:
        """End without a complete text."""
        if not self.done:
            self.failure = failure

    def take(self) -> list[Piece]:
        """What has become ready to be shown since the last call."""
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def take_rounds(self) -> list[Round]:
        """The rounds that have been settled since the last piece of text or call."""
        rounds, self._rounds = self._rounds, []
        return rounds

    def _count(self, result: Result) -> None:
        # The same round can be reported by a repeated message, and verified twice after a repeated one.
        once = (result.status.value, result.base_len, result.batch if result.status is Status.PREFILLED else "")
        if once in self._counted or result.status is Status.CONFLICT:
            return
        self._counted.add(once)
        tally = self.tally
        if result.status is Status.PREFILLED:
            self._chunks_ms += result.verify_ms
            return
        # A round's wait counts from its arrival, so it holds the time in which its prompt's chunks were computed.
        verify_ms = result.verify_ms + self._chunks_ms
        queue_ms = max(0.0, result.queue_ms - self._chunks_ms)
        self._chunks_ms = 0.0
        tally.draft_ms += result.draft_ms
        tally.queue_ms += queue_ms
        tally.verify_ms += verify_ms
        if result.status is Status.COMMITTED:
            tally.rounds += 1
            tally.drafts += result.trimmed_to > 0
            tally.drafted += result.drafted
            tally.verified += result.trimmed_to
            tally.accepted += result.accepted
            self._rounds.append(
                Round(
                    round=result.round,
                    start=result.base_len - self.prompt_len,
                    tokens=len(result.tokens),
                    drafted=result.drafted,
                    verified=result.trimmed_to,
                    accepted=result.accepted,
                    draft_ms=result.draft_ms,
                    queue_ms=queue_ms,
                    verify_ms=verify_ms,
                )
            )

    def _release(self, characters: int) -> None:
        """Make ready the tokens whose whole text is known to be no part of a stop string."""
        self._released += characters
        tokens: list[Token] = []
        while self._held and len(self._held[0].text) <= self._released:
            token = self._held.popleft()
            self._released -= len(token.text)
            tokens.append(token)
        # The first bytes of a character wait for the token that completes it.
        while tokens and not tokens[-1].text:
            self._held.appendleft(tokens.pop())
        if tokens:
            self._show(tokens)

    def _show(self, tokens: list[Token]) -> None:
        text = self.echo + "".join(token.text for token in tokens)
        self._ready.append(Piece(text, tokens, self.round, self.take_rounds()))
        self.echo = ""

    def _end(self, finish: Finish, shown: str) -> None:
        safe, hit = self.stops.feed(self._flush())
        if hit is not None:
            self._cut(len(shown + safe))
            finish = Finish.STOP
        self._close(finish)

    def _flush(self) -> str:
        """The replacement of an unfinished character at the end belongs to the last token."""
        rest = self.detokenizer.flush()
        if rest and self._held:
            self._held[-1].text += rest
        return rest

    def _stop_early(self, shown: str) -> None:
        self._cut(len(shown))
        self.stopped_early = True
        self._close(Finish.STOP)

    def _cut(self, shown: int) -> None:
        """Shorten the held tokens' texts to what may be shown of them."""
        left = self._released + shown
        for token in self._held:
            token.text = token.text[:left]
            left -= len(token.text)

    def _close(self, finish: Finish) -> None:
        if self._held or self.echo:
            self._show(list(self._held))
            self._held.clear()
        self.finish = finish


def sessions_of(tokenizer: Tokenizer) -> Callable[[Plan], Session]:
    """Makes the session of a plan, with this tokenizer's text."""

    def session(plan: Plan) -> Session:
        return Session(
            prompt_len=len(plan.prompt),
            stop_ids=frozenset(plan.stop_ids),
            detokenizer=Detokenizer(tokenizer),
            stops=StopStrings(plan.stops),
            echo=plan.echo,
        )

    return session
