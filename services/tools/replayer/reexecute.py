"""Re-execution: computes recorded batches on a fresh engine with the verifier's code, and compares bit for bit."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.tools.replayer.core.batches import BatchJob, ComputedJob, Difference, RecordedBatches, packed
from services.tools.replayer.core.recording import RecordingError
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.verify import verify
from shared.arithmetic import distinct
from shared.engine import Engine
from shared.grammar.masks import Grammars
from shared.messages import Finish, Status, model_of
from shared.messages.logprobs import as_text
from shared.models.folder import ModelFolder

SMALLEST_CACHE = 4096
AT_ONCE = 16
"""Sessions that are computed at once."""
PASS_TOKENS = 1024
"""Most tokens of a batch of several sessions."""


@dataclass
class ReexecutionReport:
    """Result of a re-execution. The fields are keys of `wisp replay --verify --json`."""

    batches: int = 0
    jobs: int = 0
    tokens: int = 0
    """Committed tokens that were compared."""
    digests: int = 0
    """Digests of logits that were compared."""
    differences: list[Difference] = field(default_factory=list)
    """The first difference of each session: later ones may follow from it."""
    unproven: list[Difference] = field(default_factory=list)
    """The first of each session in tokens that were recorded in another arithmetic, which may choose another token
    where two logits nearly tie."""
    arithmetic: str = ""
    """The arithmetic of this machine."""
    recorded_in: list[str] = field(default_factory=list)
    """Arithmetics of the recorded results that were compared, as far as known."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Jobs that cannot be computed again, by reason."""
    invariant: bool = True
    """True if the engine guarantees the same bits in any batch on this torch device."""
    sessions: int = 0
    """Sessions whose jobs were all computed, except those in `left_out`."""
    sessions_left_out: int = 0
    """Sessions left out, wholly or in part, by the limits of sessions and of time."""


def matching_dtype(folder: ModelFolder, fingerprints: Collection[str]) -> str:
    """Return the format of weights in which a model folder has the recording's fingerprint. Raises RecordingError."""
    if not fingerprints:
        raise RecordingError("there is no batch in the recording, so nothing to verify")
    if len(fingerprints) > 1:
        raise RecordingError(
            f"the recording is of {len(fingerprints)} models ({', '.join(sorted(fingerprints))}); verify the sessions "
            "of one of them by name"
        )
    own = {folder.fingerprint(dtype): dtype for dtype in folder.dtypes}
    (fingerprint,) = fingerprints
    if fingerprint not in own:
        known = ", ".join(f"{mark} in {dtype}" for mark, dtype in own.items())
        raise RecordingError(
            f"the recording is of model {fingerprint}, and {folder.path} is {known}; name the model's folder with "
            "--target"
        )
    return own[fingerprint]


def reexecute(
    recorded: RecordedBatches,
    target: Path,
    *,
    only: Collection[str] | None = None,
    device: str = "cpu",
    threads: int = 1,
    words: Callable[[int], str] = str,
    report_progress: Callable[[int, int], None] = lambda done, jobs: None,
    most_sessions: int | None = None,
    time_limit_s: float = math.inf,
) -> ReexecutionReport:
    """Compute the recorded batches again.

    Where the engine's bits do not depend on the batch, jobs of many sessions are computed at once, else the recorded
    batches one after the other.

    only: these sessions. words: returns a token's text. report_progress: gets the number of jobs computed so far, and
    of all. most_sessions: the latest ones. time_limit_s: no batch begins later. Raises RecordingError if the model
    folder is not the recording's model.
    """
    fingerprints = recorded.fingerprints
    if only is not None:
        fingerprints = {model_of(text.generate.fingerprint) for name, text in recorded.texts.items() if name in only}
    dtype = matching_dtype(ModelFolder(target), fingerprints)
    budget = max(recorded.cache_tokens, SMALLEST_CACHE)
    engine = Engine(target, dtype=dtype, device=device, threads=threads, budget_tokens=budget)
    report = ReexecutionReport(invariant=engine.batch_invariant, arithmetic=engine.arithmetic)
    if recorded.contradiction is not None and (only is None or recorded.contradiction.session in only):
        report.differences.append(recorded.contradiction)
    lanes = recorded.lanes(only)
    report.left_out = Counter(recorded.left_out)
    if most_sessions is not None and len(lanes) > most_sessions:
        report.sessions_left_out = len(lanes) - most_sessions
        lanes = dict(list(lanes.items())[-most_sessions:])
    if engine.batch_invariant:
        batches = packed(lanes.values(), AT_ONCE, budget, PASS_TOKENS)
    else:
        batches = ([(batch_id, job) for job in jobs] for batch_id, jobs in recorded.computed(lanes))
    grammars = Grammars.of(ModelFolder(target))
    _Reexecution(engine, grammars, report, lanes, words, report_progress).run(batches, time.monotonic() + time_limit_s)
    return report


class _Reexecution:
    """One re-execution: what is still to be computed, and the report so far."""

    def __init__(
        self,
        engine: Engine,
        grammars: Grammars,
        report: ReexecutionReport,
        lanes: Mapping[str, Sequence[BatchJob]],
        words: Callable[[int], str],
        report_progress: Callable[[int, int], None],
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._report = report
        self._words = words
        self._report_progress = report_progress
        self._remaining = {session_id: len(lane) for session_id, lane in lanes.items()}
        self._jobs = sum(self._remaining.values())
        self._done = 0
        self._batch_ids: set[str] = set()
        self._differing = {difference.session for difference in report.differences}

    def run(self, batches: Iterator[list[BatchJob]], until_s: float) -> None:
        """Compute batches until the end, or until a time by the monotonic clock."""
        for batch in batches:
            if time.monotonic() >= until_s:
                unfinished = sum(1 for count in self._remaining.values() if count)
                self._report.sessions_left_out += unfinished
                break
            self._compute(batch)
        self._report.batches = len(self._batch_ids)
        self._report.sessions = sum(1 for count in self._remaining.values() if not count)

    def _compute(self, batch: Sequence[BatchJob]) -> None:
        report = self._report
        compared = [(batch_id, job) for batch_id, job in batch if job.job.session not in self._differing]
        tasks = [_task(job) for _, job in compared]
        outcomes, _ = verify(self._engine, tasks, digests=True, grammars=self._grammars)
        report.jobs += len(compared)
        for (batch_id, job), outcome in zip(compared, outcomes, strict=True):
            self._batch_ids.add(batch_id)
            here = job.result.arithmetic in ("", self._engine.arithmetic)
            report.recorded_in = distinct([*report.recorded_in, job.result.arithmetic])
            difference = _compare(batch_id, job, outcome, report, self._words, bits=here)
            if difference is not None and here:
                report.differences.append(difference)
                self._differing.add(difference.session)
            elif difference is not None and difference.session not in {one.session for one in report.unproven}:
                report.unproven.append(difference)
        for _, job in batch:
            session_id = job.job.session
            if session_id in self._remaining:  # the other jobs of a recorded batch are computed but not counted
                self._done += 1
                self._remaining[session_id] -= 1
            if self._remaining.get(session_id) == 0 or job.result.finish is not None:
                self._engine.release(session_id)
        self._report_progress(self._done, self._jobs)


def _task(computed: ComputedJob) -> VerifyTask:
    generate = computed.text.generate
    return VerifyTask(
        session_id=computed.job.session,
        tokens=computed.tokens,
        draft=computed.job.draft,
        sampling=generate.sampling,
        stop_ids=frozenset(generate.stop_ids),
        room=computed.text.room - computed.job.base_len,
        prefill_to=computed.job.prefill_to,
    )


def _compare(
    batch_id: str,
    computed: ComputedJob,
    outcome: VerifyOutcome,
    report: ReexecutionReport,
    words: Callable[[int], str],
    *,
    bits: bool,
) -> Difference | None:
    """Return the first difference between a job's recorded result and its new outcome. bits: also in the logits."""
    job, result = computed.job, computed.result

    def difference(position: int, said: str) -> Difference:
        return Difference(job.session, position, batch_id, said)

    if outcome.error is not None:
        return difference(job.base_len, f"the engine refuses a job that it computed in the recording: {outcome.error}")
    if outcome.verdict is None:
        return None
    verdict = outcome.verdict
    for position, token in enumerate(verdict.tokens, job.base_len):
        if position >= len(computed.text.tokens):
            break  # the rest of the text was not recorded
        report.tokens += 1
        if (recorded := computed.text.tokens[position]) != token:
            return difference(
                position,
                f"token {recorded} ({words(recorded)!r}) was recorded, the model chooses {token} ({words(token)!r})",
            )
    if computed.alone and result.status is Status.COMMITTED:
        then = len(result.tokens), result.accepted, result.finish
        now = len(verdict.tokens), verdict.accepted, verdict.finish
        if then != now:
            return difference(job.base_len, f"{_counts(*then)} was recorded, the model gives {_counts(*now)}")
    if bits and result.logprobs and result.logprobs != as_text(outcome.logprobs):
        return difference(job.base_len, "the tokens are the same, but not the recorded log-probabilities")
    if bits and result.logits_digest is not None:
        report.digests += 1
        if result.logits_digest != outcome.logits_digest:
            return difference(
                job.base_len,
                f"the tokens are the same, but not the logits' bits: {result.logits_digest} was recorded, "
                f"{outcome.logits_digest} computed",
            )
    return None


def _counts(tokens: int, accepted: int, finish: Finish | None) -> str:
    """Describe a verdict without its tokens."""
    end = f", the end ({finish})" if finish else ", no end"
    return f"{tokens} tokens, {accepted} of them drafts{end}"
