"""What the verifiers computed, put together again from a recording: batches of jobs, each with all that judging it
needs and what was said of it. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from services.tools.replayer.core.recording import Recording
from shared.messages import Batch, Generate, Heartbeat, Job, Result, Status


@dataclass(frozen=True)
class Difference:
    """A place where a recording does not say what the model says, or contradicts itself."""

    session: str
    position: int
    """Of the token, counted from the first of the prompt."""
    batch: str
    said: str


@dataclass
class Text:
    """A session's request and its text, as the recording has them."""

    generate: Generate
    tokens: list[int]
    """Prompt and committed tokens, as far as they are known without a gap."""

    @property
    def room(self) -> int:
        """Length at which the session ends at the latest."""
        return len(self.generate.prompt) + self.generate.max_tokens


@dataclass(frozen=True)
class Computed:
    """A job, and the result that it had."""

    job: Job
    result: Result
    text: Text
    alone: bool
    """No other result has tokens from this position on, so what it says is this job's own."""

    @property
    def tokens(self) -> list[int]:
        """What was committed before it."""
        return self.text.tokens[: self.job.base_len]


@dataclass
class Work:
    """Everything that was computed, in the order in which the batches were sent."""

    texts: dict[str, Text]
    fingerprints: set[str]
    """Of the models that were asked for."""
    cache_tokens: int
    """The largest verifier's cache; 0 where no verifier was heard of."""
    contradiction: Difference | None
    """The first place where two results of a session disagree."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Jobs that cannot be done again, by reason."""
    _batches: list[Batch] = field(default_factory=list)
    _results: dict[tuple[str, str], Result] = field(default_factory=dict)
    """By batch and session."""
    _told: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many results have tokens of a session from a position on."""

    def batches(self, only: Collection[str] | None = None) -> Iterator[tuple[str, list[Computed]]]:
        """Names of batches and what was computed in them. only: batches with one of these sessions."""
        self.left_out.clear()
        for batch in self._batches:
            if only is not None and not any(job.session in only for job in batch.jobs):
                continue
            jobs = [computed for job in batch.jobs if (computed := self._computed(batch, job)) is not None]
            if jobs:
                yield batch.batch, jobs

    def _computed(self, batch: Batch, job: Job) -> Computed | None:
        result = self._results.get((batch.batch, job.session))
        text = self.texts.get(job.session)
        if result is None:
            self.left_out["no result was recorded"] += 1
        elif result.status is Status.FAILED or not result.new_tokens:
            # Settled by the store alone, refused, or a chunk that was cached already.
            self.left_out["nothing was computed for it"] += 1
        elif text is None:
            self.left_out["the beginning of its session is not in the recording"] += 1
        elif len(text.tokens) < job.base_len:
            self.left_out["a part of its text is not in the recording"] += 1
        else:
            return Computed(job, result, text, self._told[job.session, job.base_len] == 1)
        return None


def work_of(recording: Recording) -> Work:
    """What was computed."""
    texts: dict[str, Text] = {}
    batches: list[Batch] = []
    results: dict[tuple[str, str], Result] = {}
    brought: dict[str, list[Result]] = {}
    cache_tokens = 0
    for entry in recording.entries():
        match entry.message:
            case Generate() as generate:
                texts[generate.session] = Text(generate, list(generate.prompt))
            case Batch() as batch:
                batches.append(batch)
            case Result() as result:
                results.setdefault((result.batch, result.session), result)
                if result.tokens:
                    brought.setdefault(result.session, []).append(result)
            case Heartbeat() as heartbeat:
                cache_tokens = max(cache_tokens, heartbeat.total_tokens)
            case _:
                pass
    contradiction = None
    for session, known in brought.items():
        if session in texts:
            found = _write(texts[session].tokens, known)
            contradiction = contradiction or found
    asked = {job.fingerprint for batch in batches for job in batch.jobs}
    told = Counter((result.session, result.base_len) for known in brought.values() for result in known)
    return Work(texts, asked, cache_tokens, contradiction, _batches=batches, _results=results, _told=told)


def _write(tokens: list[int], results: Sequence[Result]) -> Difference | None:
    """Append what results say; returns the first place where they disagree."""
    found = None
    for result in sorted(results, key=lambda one: one.base_len):
        if result.base_len > len(tokens):
            break  # a gap: what comes after it hangs in the air
        for position, token in enumerate(result.tokens, result.base_len):
            if position == len(tokens):
                tokens.append(token)
            elif tokens[position] != token and found is None:
                found = Difference(
                    result.session,
                    position,
                    result.batch,
                    f"its result says token {token} where an earlier one says {tokens[position]}",
                )
    return found
