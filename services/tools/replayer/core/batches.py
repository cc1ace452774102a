"""Recorded batches with the input of a verifier that computes them again, and with their recorded results.

A report of a run counts as a batch of its own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from services.tools.replayer.core.recording import Recording
from shared.messages import Batch, Generate, Heartbeat, Job, Result, Status, model_of

BLOCK_ROOM = 128
"""Tokens by which a session's blocks in the cache may exceed its tokens."""


@dataclass(frozen=True)
class Difference:
    """A position at which a recording differs from the model's result, or contradicts itself."""

    session: str
    position: int
    """Position of the token, counted from the first of the prompt."""
    batch: str
    said: str
    """The difference in words."""


@dataclass
class RecordedText:
    """A session's request and its text."""

    generate: Generate
    tokens: list[int]
    """Prompt and committed tokens, up to the first gap in the recording."""

    @property
    def room(self) -> int:
        """Greatest length of the session."""
        return len(self.generate.prompt) + self.generate.max_tokens


@dataclass(frozen=True)
class ComputedJob:
    """A job that a verifier computed, with its result."""

    job: Job
    result: Result
    text: RecordedText
    alone: bool
    """No other result has tokens from this position on, so the result must be this job's."""

    @property
    def tokens(self) -> list[int]:
        """The tokens committed before this job."""
        return self.text.tokens[: self.job.base_len]


BatchJob = tuple[str, ComputedJob]
"""A batch's id and one of its jobs."""


@dataclass
class RecordedBatches:
    """All recorded batches, in the order in which they were sent."""

    texts: dict[str, RecordedText]
    fingerprints: set[str]
    """Fingerprints of the requested models."""
    cache_tokens: int
    """Size of the largest verifier's cache; 0 without a recorded heartbeat."""
    contradiction: Difference | None
    """The first position at which two results of a session disagree."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Jobs that cannot be computed again, by reason."""
    _batches: list[Batch] = field(default_factory=list)
    _results: dict[tuple[str, str], Result] = field(default_factory=dict)
    """By batch and session."""
    _sources: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of results with tokens, by session and position."""

    def computed(self, only: Collection[str] | None = None) -> Iterator[tuple[str, list[ComputedJob]]]:
        """Yield each batch's id and its computed jobs. only: the batches with one of these sessions."""
        self.left_out.clear()
        for batch in self._batches:
            if only is not None and not any(job.session in only for job in batch.jobs):
                continue
            jobs = [computed for job in batch.jobs if (computed := self._computed(batch, job)) is not None]
            if jobs:
                yield batch.batch, jobs

    def lanes(self, only: Collection[str] | None = None) -> dict[str, list[BatchJob]]:
        """Return the computed jobs of each session in their order. only: of these sessions."""
        lanes: dict[str, list[BatchJob]] = {}
        for batch_id, jobs in self.computed(only):
            for job in jobs:
                if only is None or job.job.session in only:
                    lanes.setdefault(job.job.session, []).append((batch_id, job))
        return lanes

    def _computed(self, batch: Batch, job: Job) -> ComputedJob | None:
        result = self._results.get((batch.batch, job.session))
        text = self.texts.get(job.session)
        if result is None:
            self.left_out["no result was recorded"] += 1
        elif result.status is Status.FAILED or not result.new_tokens:
            # The job was refused, answered from Redis alone, or a chunk that was cached already.
            self.left_out["nothing was computed for it"] += 1
        elif text is None:
            self.left_out["the beginning of its session is not in the recording"] += 1
        elif len(text.tokens) < job.base_len:
            self.left_out["a part of its text is not in the recording"] += 1
        else:
            return ComputedJob(job, result, text, self._sources[job.session, job.base_len] == 1)
        return None


def packed(
    lanes: Collection[Sequence[BatchJob]], at_once: int, cache_tokens: int, pass_tokens: int
) -> Iterator[list[BatchJob]]:
    """Yield batches of the next jobs of several sessions, each session in its order and with one job in a batch.

    For an engine whose bits do not depend on the batch: larger batches take less time. lanes: each session's jobs.
    at_once: most sessions. cache_tokens: most tokens of the sessions at once. pass_tokens: most tokens of a batch.
    """
    waiting = deque(lanes)
    running: list[deque[BatchJob]] = []
    held = 0
    while waiting or running:
        while waiting and len(running) < at_once and (not running or held + _longest(waiting[0]) <= cache_tokens):
            held += _longest(waiting[0])
            running.append(deque(waiting.popleft()))
        batch: list[BatchJob] = []
        room = pass_tokens
        for lane in running:
            # A job computes the tokens after its session's previous job; the first one computes the prompt.
            _, computed = lane[0]
            room -= max(computed.result.new_tokens, len(computed.job.draft) + 1)
            if batch and room < 0:
                break
            batch.append(lane.popleft())
        yield batch
        # Sessions without a job in this batch come first in the next one.
        running = [*running[len(batch) :], *running[: len(batch)]]
        held = sum(_longest(lane) for lane in running if lane)
        running = [lane for lane in running if lane]


def _longest(lane: Sequence[BatchJob]) -> int:
    """Return the tokens that the cache needs for a session, with some room for the rest of a block."""
    return max(computed.job.base_len + len(computed.job.draft) for _, computed in lane) + BLOCK_ROOM


def recorded_batches(recording: Recording) -> RecordedBatches:
    """Return the batches of a recording."""
    texts: dict[str, RecordedText] = {}
    batches: list[Batch] = []
    results: dict[tuple[str, str], Result] = {}
    with_tokens: dict[str, list[Result]] = {}
    cache_tokens = 0
    for entry in recording.entries():
        match entry.message:
            case Generate() as generate:
                texts[generate.session] = RecordedText(generate, list(generate.prompt))
            case Batch() as batch:
                batches.append(batch)
            case Result() as result if result.run and result.session in texts:
                if result.status is Status.COMMITTED and result.tokens:
                    report = _as_batch(texts[result.session].generate, result, len(batches))
                    batches.append(report)
                    accepted = len(result.tokens) - 1
                    results[report.batch, result.session] = result.model_copy(update={"accepted": accepted})
                with_tokens.setdefault(result.session, []).append(result)
            case Result() as result:
                results.setdefault((result.batch, result.session), result)
                if result.tokens:
                    with_tokens.setdefault(result.session, []).append(result)
            case Heartbeat() as heartbeat:
                cache_tokens = max(cache_tokens, heartbeat.total_tokens)
            case _:
                pass
    contradiction = None
    for session_id, session_results in with_tokens.items():
        if session_id in texts:
            found = _append_results(texts[session_id].tokens, session_results)
            contradiction = contradiction or found
    fingerprints = {model_of(job.fingerprint) for batch in batches for job in batch.jobs}
    sources = Counter((result.session, result.base_len) for known in with_tokens.values() for result in known)
    return RecordedBatches(
        texts, fingerprints, cache_tokens, contradiction, _batches=batches, _results=results, _sources=sources
    )


def _as_batch(generate: Generate, report: Result, number: int) -> Batch:
    """Return a batch that computes the tokens of a run's report, with all but the last one as a draft.

    A position's logits have the same bits whether its token was decoded in a step of its own or verified.
    """
    job = Job(
        session=report.session,
        round=report.round,
        base_len=report.base_len,
        draft=report.tokens[:-1],
        drafted=len(report.tokens) - 1,
        drafter=report.verifier,
        gateway=generate.gateway,
        fingerprint=generate.fingerprint,
    )
    return Batch(batch=f"run-{number}", scheduler=report.verifier, jobs=[job], predicted_ms=0.0, policy="run")


def _append_results(tokens: list[int], results: Sequence[Result]) -> Difference | None:
    """Append the tokens of results up to the first gap; return the first position at which two results disagree."""
    found = None
    for result in sorted(results, key=lambda one: one.base_len):
        if result.base_len > len(tokens):
            break
        for position, token in enumerate(result.tokens, result.base_len):
            if position == len(tokens):
                tokens.append(token)
            elif tokens[position] != token and found is None:
                found = Difference(
                    result.session,
                    position,
                    result.batch,
                    f"its result has token {token} where an earlier one has {tokens[position]}",
                )
    return found
