"""Recorded batches on a fresh engine, by the verifier's own code, compared bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from services.tools.replayer.core.batches import Computed, Difference, Work
from services.tools.replayer.core.recording import RecordingError
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine
from shared.messages import Finish, Status
from shared.models.folder import ModelFolder

DTYPES = ("bfloat16", "float32")
SMALLEST_CACHE = 4096


@dataclass
class Report:
    """What came of it."""

    batches: int = 0
    jobs: int = 0
    tokens: int = 0
    """Committed tokens that were compared."""
    digests: int = 0
    """Digests of logits that were compared."""
    differences: list[Difference] = field(default_factory=list)
    """The first of each session: what it got later builds on it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Jobs that could not be done again, by reason."""
    invariant: bool = True
    """Whether the engine promises the same bits in any batch on this device."""


def fitting_dtype(folder: ModelFolder, fingerprints: Collection[str]) -> str:
    """The number format in which a model folder is the model of the recording. Raises RecordingError."""
    if not fingerprints:
        raise RecordingError("there is no batch in the recording, so nothing to verify")
    if len(fingerprints) > 1:
        raise RecordingError(
            f"the recording is of {len(fingerprints)} models ({', '.join(sorted(fingerprints))}); verify the sessions "
            "of one of them by name"
        )
    own = {folder.fingerprint(dtype): dtype for dtype in DTYPES}
    (asked,) = fingerprints
    if asked not in own:
        told = ", ".join(f"{mark} in {dtype}" for mark, dtype in own.items())
        raise RecordingError(
            f"the recording is of model {asked}, and {folder.path} is {told}; name the model's folder with --target"
        )
    return own[asked]


def reexecute(
    work: Work,
    target: Path,
    *,
    only: Collection[str] | None = None,
    device: str = "cpu",
    threads: int = 1,
    words: Callable[[int], str] = str,
    tell: Callable[[int], None] = lambda done: None,
) -> Report:
    """Do the recorded batches again, those with a session of `only` if that is given.

    words: the text of a token. tell: hears how many batches are done. Raises RecordingError
    where the recording and the model do not fit.
    """
    asked = work.fingerprints
    if only is not None:
        asked = {text.generate.fingerprint for name, text in work.texts.items() if name in only}
    dtype = fitting_dtype(ModelFolder(target), asked)
    budget = max(work.cache_tokens, SMALLEST_CACHE)
    engine = Engine(target, dtype=dtype, device=device, threads=threads, budget_tokens=budget)
    report = Report(invariant=engine.batch_invariant)
    if work.contradiction is not None and (only is None or work.contradiction.session in only):
        report.differences.append(work.contradiction)
    spoilt = {difference.session for difference in report.differences}
    for name, jobs in work.batches(only):
        judged = [job for job in jobs if job.job.session not in spoilt]
        if not judged:
            continue
        outcomes, _ = verify(engine, [_task(one) for one in judged], digests=True)
        report.batches += 1
        report.jobs += len(judged)
        for one, outcome in zip(judged, outcomes, strict=True):
            if (found := _compare(name, one, outcome, report, words)) is not None:
                report.differences.append(found)
                spoilt.add(found.session)
            if one.result.finish is not None:
                engine.release(one.job.session)
        tell(report.batches)
    report.left_out = Counter(work.left_out)
    return report


def _ended(tokens: int, accepted: int, finish: Finish | None) -> str:
    """A verdict but for its tokens."""
    end = f", the end ({finish})" if finish else ", no end"
    return f"{tokens} tokens, {accepted} of them drafts{end}"


def _task(one: Computed) -> VerifyTask:
    generate = one.text.generate
    return VerifyTask(
        session_id=one.job.session,
        tokens=one.tokens,
        draft=one.job.draft,
        sampling=generate.sampling,
        stop_ids=frozenset(generate.stop_ids),
        room=one.text.room - one.job.base_len,
        prefill_to=one.job.prefill_to,
    )


def _compare(
    batch: str, one: Computed, outcome: VerifyOutcome, report: Report, words: Callable[[int], str]
) -> Difference | None:
    job, result = one.job, one.result

    def differs(position: int, said: str) -> Difference:
        return Difference(job.session, position, batch, said)

    if outcome.error is not None:
        return differs(job.base_len, f"the engine refuses what was computed then: {outcome.error}")
    if outcome.verdict is None:
        return None
    verdict = outcome.verdict
    for position, token in enumerate(verdict.tokens, job.base_len):
        if position >= len(one.text.tokens):
            break  # nothing more of the text was recorded
        report.tokens += 1
        if (recorded := one.text.tokens[position]) != token:
            return differs(
                position,
                f"token {recorded} ({words(recorded)!r}) was recorded, the model chooses {token} ({words(token)!r})",
            )
    if one.alone and result.status is Status.COMMITTED:
        then = len(result.tokens), result.accepted, result.finish
        now = len(verdict.tokens), verdict.accepted, verdict.finish
        if then != now:
            return differs(job.base_len, f"{_ended(*then)} was recorded, the model gives {_ended(*now)}")
    if result.logits_digest is not None:
        report.digests += 1
        if result.logits_digest != outcome.logits_digest:
            return differs(
                job.base_len,
                f"the tokens are the same, but not the logits' bits: {result.logits_digest} was recorded, "
                f"{outcome.logits_digest} computed",
            )
    return None
