"""One completion: committed tokens in, in any order and from any result; pieces of text out.

Results may arrive twice, late or never. Each result gives the position of its first token, so known tokens are skipped.
A result that starts beyond the known tokens leaves a gap (`gap`); the missing tokens have to be read from Redis.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.core.reasoning import ReasoningCounter
from shared.arithmetic import distinct
from shared.messages import Failure, Finish, Logprobs, Result, Status
from shared.messages.logprobs import TokenLogprob, from_text, unpack_logprobs
from shared.models.stop import StopStrings
from shared.prediction import PredictionFollower


class TokenDecoder(Protocol):
    """The part of `shared.models.text.Detokenizer` that a completion needs."""

    def feed(self, ids: Sequence[int]) -> str:
        """Return the characters that these tokens complete."""

    def flush(self) -> str:
        """Return the replacement for an unfinished character at the end."""


@dataclass
class Token:
    """One output token with the text that it completes. A character belongs to the token of its last byte."""

    id: int
    text: str
    draft: bool
    """True for an accepted draft token, False for the target's own."""
    logprob: TokenLogprob | None = None
    """Its log-probability, if the session asks for it."""


@dataclass
class CompletionRound:
    """Tokens and costs of one round, including the prefill chunks before it, or of one report of a run."""

    round: int
    start: int
    """Output tokens before this round."""
    tokens: int
    """Committed tokens, including the one that ended the completion."""
    drafted: int
    verified: int
    accepted: int
    draft_ms: float
    queue_ms: float
    verify_ms: float
    run: bool = False
    """True for tokens that the verifier decoded in a run."""
    verifier: str = ""
    batch: str = ""
    """The verifier's batch; `run` for a report of a run."""
    sources: list[str] = field(default_factory=list)
    """Source of each verified draft token; empty if unknown."""


@dataclass
class Piece:
    """Text to send, its tokens, and the rounds that were settled since the last piece."""

    text: str
    tokens: list[Token]
    round: int
    rounds: list[CompletionRound] = field(default_factory=list)


@dataclass
class CompletionTally:
    """Costs of a completion, summed over its rounds."""

    rounds: int = 0
    drafts: int = 0
    """Rounds with at least one verified draft token."""
    tokens: int = 0
    """Output tokens, without the end-of-text token."""
    drafted: int = 0
    verified: int = 0
    """Draft tokens that were verified: the drafted ones minus those that the scheduler trimmed."""
    accepted: int = 0
    run_tokens: int = 0
    """Tokens that verifiers decoded in runs, without rounds."""
    copied: int = 0
    """Tokens of runs that are accepted copies from earlier text."""
    copies_verified: int = 0
    """Copied tokens that were verified in runs."""
    draft_ms: float = 0.0
    queue_ms: float = 0.0
    verify_ms: float = 0.0
    accepted_in_round: Counter[int] = field(default_factory=Counter)
    """Rounds with a verified draft, by the number of its accepted tokens."""
    longest_draft: int = 0
    """Most verified draft tokens of a round."""


@dataclass
class Completion:
    """State of one completion.

    It ends with `finish` (complete) or `failure` (never complete). `stopped_early` means that a stop string ended the
    completion while its session still runs: the session has to be cancelled.
    """

    prompt_len: int
    stop_ids: frozenset[int]
    detokenizer: TokenDecoder
    stops: StopStrings
    echo: str = ""
    """Text to send before the generated text, with the first piece."""
    include_stop: bool = False
    """True if the text includes the stop string or the stop token that ends it."""
    min_tokens: int = 0
    """Output tokens in which no stop string ends the text."""
    logprobs: Logprobs | None = None
    """The log-probabilities that the session asks for. Tokens that arrive without them count as missing."""
    prompt_only: bool = False
    """True if the one output token of the session is not shown: the request wants its prompt's tokens only."""
    tags: StopStrings | None = None
    """Finds texts that no piece may cut; None if there are none."""
    reasoning: ReasoningCounter | None = None
    """Counts the tokens of reasoning; None if no reasoning is marked."""
    predicted: PredictionFollower | None = None
    """The output's place in the text that the client expects; None if it expects nothing."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens but the first, if the session asks for them."""
    length: int = field(init=False)
    """Known committed tokens, prompt included."""
    round: int = 0
    gap: bool = False
    finish: Finish | None = None
    failure: Failure | None = None
    stopped_early: bool = False
    tally: CompletionTally = field(default_factory=CompletionTally)
    committed_in: list[str] = field(default_factory=list)
    """Arithmetics in which the session's tokens were committed."""
    _ready: deque[Piece] = field(default_factory=deque)
    _held: deque[Token] = field(default_factory=deque)
    """Tokens whose text is incomplete or could still become part of a stop string."""
    _released: int = 0
    """Characters of the held tokens that cannot be part of a stop string."""
    _counted: set[tuple[str, int, str]] = field(default_factory=set)
    _rounds: list[CompletionRound] = field(default_factory=list)
    _chunks_ms: float = 0.0
    """Time of the prefill chunks since the last settled round."""
    _chunk_tokens: int = 0
    """Prompt tokens computed in prefill chunks."""
    _settled: bool = False
    """True once a round is committed."""
    cached_prompt: int = 0
    """Tokens of the prompt that were not computed, because their KV was cached; 0 if unknown."""

    def __post_init__(self) -> None:
        self.length = self.prompt_len

    @property
    def done(self) -> bool:
        """True if the completion has ended."""
        return self.finish is not None or self.failure is not None

    def result(self, result: Result) -> None:
        """Add a verifier's result."""
        if self.done:
            return
        if result.status is Status.FAILED:
            self.fail(result.error or Failure(code="failed", message="the verifier gave up this session"))
            return
        self._count(result)
        if result.status is Status.PREFILLED:
            return
        self.round = max(self.round, result.round)
        drafted: Collection[int] = ()
        if result.status is Status.COMMITTED:
            drafted = result.copied if result.run else range(result.accepted)
        before = self.tally.tokens
        logprobs = from_text(result.logprobs), result.logprobs_from
        self.committed(result.base_len, result.tokens, result.finish, drafted, result.committed_in, logprobs)
        if result.run:
            self.tally.run_tokens += self.tally.tokens - before

    def committed(
        self,
        base_len: int,
        tokens: Sequence[int],
        finish: Finish | None,
        drafted: Collection[int] = (),
        committed_in: Sequence[str] = (),
        logprobs: tuple[bytes, int] = (b"", 0),
    ) -> None:
        """Add committed tokens from position `base_len` on; those at the indices `drafted` are accepted draft tokens.

        `finish` is the reason why the session ended with the last token. `committed_in` has all arithmetics of the
        session up to then, in order. `logprobs` are the records of the log-probabilities that are known, and the
        position of the first one.
        """
        if self.done:
            return
        self.committed_in = distinct([*self.committed_in, *committed_in])
        known = self.length - base_len
        found = self._records(*logprobs) if tokens[max(known, 0) :] else None
        if known < 0 or (found is not None and not self._covers(found, base_len + len(tokens))):
            self.gap = True
            return
        self.gap = False
        if found is not None and self.length == self.prompt_len:
            self.prompt_logprobs = [found[at] for at in range(self.first_logprob, self.prompt_len)]
        if self.prompt_only and tokens[known:]:
            self.length += 1
            self._end(Finish.LENGTH, "")
            return
        safe_text = ""
        ended = False
        for position, token in enumerate(tokens[known:], start=known):
            self.length += 1
            ended = token in self.stop_ids
            if ended:
                finish = finish or Finish.STOP
                if not self.include_stop:
                    break
            text = self.detokenizer.feed([token])
            self.tally.tokens += 1
            if self.predicted is not None:
                self.predicted.push(token)
            logprob = None if found is None else found[base_len + position]
            self._held.append(Token(token, text, position in drafted, logprob))
            safe, hit = self.stops.feed(text, ends=self.tally.tokens > self.min_tokens)
            safe_text += safe if self.tags is None else self.tags.feed(safe, ends=False)[0]
            if hit is not None:
                safe_text += "" if self.tags is None else self.tags.flush()
                self._stop_early(safe_text + hit if self.include_stop else safe_text)
                return
            if ended:
                break
        if finish is not None and (ended or base_len + len(tokens) == self.length):
            self._end(finish, safe_text)
        else:
            self._release(len(safe_text))

    @property
    def first_logprob(self) -> int:
        """Position of the session's first token with a log-probability: the first token of all has none."""
        return self.prompt_len if self.logprobs is None or self.logprobs.prompt_len is None else 1

    def _records(self, body: bytes, start: int) -> dict[int, TokenLogprob] | None:
        """Return log-probabilities by position; None if the session asks for none."""
        if self.logprobs is None:
            return None
        return dict(enumerate(unpack_logprobs(body, self.logprobs.top), start))

    def _covers(self, found: dict[int, TokenLogprob], end: int) -> bool:
        """Return whether no position up to `end` lacks its log-probability."""
        first = self.first_logprob if self.length == self.prompt_len else self.length
        return all(at in found for at in range(first, end))

    def fail(self, failure: Failure) -> None:
        """End the completion with an error."""
        if not self.done:
            self.failure = failure

    def take(self) -> list[Piece]:
        """Return the pieces that became ready since the last call."""
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def take_rounds(self) -> list[CompletionRound]:
        """Return the rounds settled since the last piece or call."""
        rounds, self._rounds = self._rounds, []
        return rounds

    def _count(self, result: Result) -> None:
        # A message may be delivered twice, and a repeated round may be verified twice.
        once = (result.status.value, result.base_len, result.batch if result.status is Status.PREFILLED else "")
        if once in self._counted or result.status is Status.CONFLICT:
            return
        self._counted.add(once)
        tally = self.tally
        if result.status is Status.PREFILLED:
            self._chunks_ms += result.verify_ms
            self._chunk_tokens += result.new_tokens
            return
        # A round's queue time starts at its arrival, so it includes the time of its prefill chunks.
        verify_ms = result.verify_ms + self._chunks_ms
        queue_ms = max(0.0, result.queue_ms - self._chunks_ms)
        self._chunks_ms = 0.0
        tally.draft_ms += result.draft_ms
        tally.queue_ms += queue_ms
        tally.verify_ms += verify_ms
        if result.status is Status.COMMITTED:
            if result.run:
                tally.copied += len(result.copied)
                tally.copies_verified += result.trimmed_to
            else:
                tally.rounds += 1
                tally.drafts += result.trimmed_to > 0
                tally.drafted += result.drafted
                tally.verified += result.trimmed_to
                tally.accepted += result.accepted
            if result.trimmed_to and not result.run:
                tally.accepted_in_round[result.accepted] += 1
                tally.longest_draft = max(tally.longest_draft, result.trimmed_to)
            if not self._settled:
                self._settled = True
                computed = self._chunk_tokens + result.new_tokens - result.trimmed_to
                self.cached_prompt = max(0, self.prompt_len - max(computed, 1)) if result.new_tokens else 0
            self._rounds.append(
                CompletionRound(
                    round=result.round,
                    start=result.base_len - self.prompt_len,
                    tokens=len(result.tokens),
                    drafted=result.drafted,
                    verified=result.trimmed_to,
                    accepted=result.accepted_drafts,
                    draft_ms=result.draft_ms,
                    queue_ms=queue_ms,
                    verify_ms=verify_ms,
                    run=result.run,
                    verifier=result.verifier,
                    batch=result.batch,
                    sources=result.sources,
                )
            )

    def _release(self, characters: int) -> None:
        """Make ready the held tokens whose whole text cannot be part of a stop string."""
        self._released += characters
        tokens: list[Token] = []
        while self._held and len(self._held[0].text) <= self._released:
            token = self._held.popleft()
            self._released -= len(token.text)
            tokens.append(token)
        # The first bytes of a character are sent with the token that completes it.
        while tokens and not tokens[-1].text:
            self._held.appendleft(tokens.pop())
        if tokens:
            self._emit(tokens)

    def _emit(self, tokens: list[Token], rest: str = "") -> None:
        """Make a piece ready. rest: text after that of the tokens."""
        texts = [token.text for token in tokens]
        text = self.echo + "".join(texts) + rest
        if self.reasoning is not None:
            self.reasoning.add(texts)
        self._ready.append(Piece(text, tokens, self.round, self.take_rounds()))
        self.echo = ""

    def _end(self, finish: Finish, safe_text: str) -> None:
        rest = self.detokenizer.flush()
        safe, hit = self.stops.feed(rest, ends=self.tally.tokens > self.min_tokens)
        if self._held:
            self._held[-1].text += rest
            rest = ""
        if hit is not None:
            safe = safe if self.tags is None else self.tags.flush() + safe
            self._cut(len(safe_text + safe) + len(hit) * self.include_stop)
            finish, rest = Finish.STOP, ""
        # The last token, of an earlier result, may be sent already: then the unfinished character has none.
        self._close(finish, rest)

    def _stop_early(self, safe_text: str) -> None:
        self._cut(len(safe_text))
        self.stopped_early = True
        self._close(Finish.STOP)

    def _cut(self, safe: int) -> None:
        """Cut the held tokens' texts off at the stop string."""
        left = self._released + safe
        for token in self._held:
            token.text = token.text[:left]
            left -= len(token.text)

    def _close(self, finish: Finish, rest: str = "") -> None:
        if self._held or self.echo or rest:
            self._emit(list(self._held), rest)
            self._held.clear()
        self.finish = finish
