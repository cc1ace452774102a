"""Re-execution: computes recorded batches on a fresh engine with the verifier's code, and compares bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from services.tools.replayer.core.batches import ComputedJob, Difference, RecordedBatches
from services.tools.replayer.core.recording import RecordingError
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.verify import verify
from shared.arithmetic import distinct
from shared.engine import Engine
from shared.messages import Finish, Status
from shared.models.folder import ModelFolder

SMALLEST_CACHE = 4096


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
    """The first of each session, on which its later rounds build."""
    unproven: list[Difference] = field(default_factory=list)
    """The first of each session in tokens that were computed in another arithmetic than here, where close calls may go
    the other way."""
    arithmetic: str = ""
    """The arithmetic of this machine."""
    recorded_in: list[str] = field(default_factory=list)
    """Arithmetics of the recorded results that were compared, as far as known."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Jobs that cannot be computed again, by reason."""
    invariant: bool = True
    """True if the engine promises the same bits in any batch on this device."""


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
    report_progress: Callable[[int], None] = lambda done: None,
) -> ReexecutionReport:
    """Compute the recorded batches again.

    only: the batches with one of these sessions. words: returns a token's text. report_progress: gets the number of
    batches computed so far. Raises RecordingError if the model folder is not the recording's model.
    """
    fingerprints = recorded.fingerprints
    if only is not None:
        fingerprints = {text.generate.fingerprint for name, text in recorded.texts.items() if name in only}
    dtype = matching_dtype(ModelFolder(target), fingerprints)
    budget = max(recorded.cache_tokens, SMALLEST_CACHE)
    engine = Engine(target, dtype=dtype, device=device, threads=threads, budget_tokens=budget)
    report = ReexecutionReport(invariant=engine.batch_invariant, arithmetic=engine.arithmetic)
    if recorded.contradiction is not None and (only is None or recorded.contradiction.session in only):
        report.differences.append(recorded.contradiction)
    differing = {difference.session for difference in report.differences}
    for batch_id, jobs in recorded.computed(only):
        compared = [job for job in jobs if job.job.session not in differing]
        if not compared:
            continue
        outcomes, _ = verify(engine, [_task(job) for job in compared], digests=True)
        report.batches += 1
        report.jobs += len(compared)
        for job, outcome in zip(compared, outcomes, strict=True):
            here = job.result.arithmetic in ("", engine.arithmetic)
            report.recorded_in = distinct([*report.recorded_in, job.result.arithmetic])
            difference = _compare(batch_id, job, outcome, report, words, bits=here)
            if difference is not None and here:
                report.differences.append(difference)
                differing.add(difference.session)
            elif difference is not None and difference.session not in {one.session for one in report.unproven}:
                report.unproven.append(difference)
            if job.result.finish is not None:
                engine.release(job.job.session)
        report_progress(report.batches)
    report.left_out = Counter(recorded.left_out)
    return report


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
        return difference(job.base_len, f"the engine refuses what was computed then: {outcome.error}")
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
