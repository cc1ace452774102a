"""`wisp replay --verify`: compute the recorded batches again and compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from enum import IntEnum

from rich.text import Text

from services.tools.cli.replay.recordings import print_notes, token_texts
from services.tools.cli.terminal import err, out, print_fields
from services.tools.local.progress import ConsoleProgress
from services.tools.local.service_commands import cores
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_target
from services.tools.replayer.core.batches import Difference, recorded_batches
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.selection import find_session
from services.tools.replayer.reexecute import ReexecutionReport, reexecute

SHOWN = 5


class VerifyStatus(IntEnum):
    """Exit status of `wisp replay --verify`."""

    SAME = 0
    DIFFERENT = 1
    """In the arithmetic of the recording, or nothing could be compared."""
    UNPROVEN = 3
    """Different only where the recording is of another arithmetic, which proves neither a fault nor its absence."""

    @classmethod
    def of(cls, report: ReexecutionReport) -> VerifyStatus:
        """Return the status for this report."""
        if report.differences or not report.tokens:
            return cls.DIFFERENT
        return cls.UNPROVEN if report.unproven else cls.SAME


def verify_recording(
    recording: Recording,
    session: str | None,
    target: str | None,
    *,
    most_sessions: int | None,
    time_limit_s: float,
    as_json: bool,
) -> VerifyStatus:
    """Compute a recording's batches again and print the comparison. Raises RecordingError.

    most_sessions: the latest ones; None for all. time_limit_s: how long to compute; 0 for no limit.
    """
    recording.refuse_redacted("verify")
    progress = ConsoleProgress(err)
    folder = prepare_target(target or LocalSettings().target, progress)
    work = recorded_batches(recording)
    print_notes(recording)
    only = None if session is None else {find_session(session, work.texts)}
    words = token_texts(target, {text.generate.vocab_fingerprint for text in work.texts.values()}, recording)
    with progress.step("computing the recorded batches again") as step:
        report = reexecute(
            work,
            folder,
            only=only,
            threads=cores(),
            words=words,
            report_progress=lambda done, jobs: step.detail(f"{done:,} of {jobs:,} jobs, {done / jobs:.0%}"),
            most_sessions=most_sessions,
            time_limit_s=time_limit_s or math.inf,
        )
        step.done(f"{report.batches:,} batches of {report.sessions:,} sessions computed again")
    status = VerifyStatus.of(report)
    if as_json:
        print_fields(out, {"same": status is VerifyStatus.SAME, **asdict(report)})
    else:
        print_report(report)
    return status


def print_report(report: ReexecutionReport) -> None:
    """Print a report for people."""
    out.print(
        f"{report.batches} batches, {report.jobs} jobs: {report.tokens} committed tokens and {report.digests} digests "
        "of logits compared",
        soft_wrap=True,
    )
    for reason, count in report.left_out.most_common():
        out.print(Text(f"  {count} jobs left out: {reason}", "dim"), soft_wrap=True)
    if report.sessions_left_out:
        known = report.sessions + report.sessions_left_out
        note = (
            f"  {report.sessions_left_out:,} of {known:,} sessions were not compared, or not wholly: --sessions and "
            "--time-limit set the limits"
        )
        out.print(Text(note, "yellow"), soft_wrap=True)
    if not report.invariant:
        out.print(Text("  on this machine the bits depend on the batch: digests may differ without an error", "yellow"))
    elsewhere = [arithmetic for arithmetic in report.recorded_in if arithmetic != report.arithmetic]
    if elsewhere:
        note = (
            f"  recorded in the arithmetic {' and '.join(elsewhere)}, computed here in {report.arithmetic}: the logits "
            "have other bits and are not compared there; another token is no fault where two logits nearly tie"
        )
        out.print(Text(note, "yellow"), soft_wrap=True)
    if report.differences:
        out.print(Text("DIFFERENT", "bold red"))
        _print_differences(report.differences)
    if report.unproven:
        out.print(Text("different in another arithmetic, which proves nothing", "bold yellow"))
        _print_differences(report.unproven)
    if report.differences or report.unproven:
        return
    if not report.tokens:
        out.print(Text("nothing could be compared", "bold yellow"))
    elif elsewhere:
        out.print(Text("the same tokens", "bold green"))
    else:
        digests = "" if report.digests else " (no digests: recorded by verifiers without WISP_JOURNAL)"
        out.print(Text(f"identical, bit for bit{digests}", "bold green"), soft_wrap=True)


def _print_differences(differences: Sequence[Difference]) -> None:
    for one in differences[:SHOWN]:
        said = f"  session {one.session}, position {one.position}, batch {one.batch}: {one.said}"
        out.print(Text(said), soft_wrap=True)
    if (more := len(differences) - SHOWN) > 0:
        out.print(f"  and {more} more sessions")
