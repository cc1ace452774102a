"""`wisp replay --verify`: compute the recorded batches again and compare."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.text import Text

from services.tools.cli.replay.recordings import print_notes, token_texts
from services.tools.cli.terminal import err, out
from services.tools.local.progress import ConsoleProgress
from services.tools.local.service_commands import cores
from services.tools.local.settings import LocalSettings
from services.tools.local.target import prepare_target
from services.tools.replayer.core.batches import recorded_batches
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.selection import find_session
from services.tools.replayer.reexecute import ReexecutionReport, reexecute

SHOWN = 5


def verify_recording(recording: Recording, session: str | None, target: str | None, *, as_json: bool) -> bool:
    """Print and return whether the model computes the recorded tokens and logits again. Raises RecordingError."""
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
            report_progress=lambda done: step.detail(f"{done} batches done"),
        )
        step.done(f"{report.batches} batches computed again")
    same = not report.differences and report.tokens > 0
    if as_json:
        out.print_json(json.dumps({"same": same, **asdict(report)}), indent=1)
    else:
        _print(report)
    return same


def _print(report: ReexecutionReport) -> None:
    out.print(
        f"{report.batches} batches, {report.jobs} jobs: {report.tokens} committed tokens and {report.digests} digests "
        "of logits compared",
        soft_wrap=True,
    )
    for reason, count in report.left_out.most_common():
        out.print(Text(f"  {count} jobs left out: {reason}", "dim"), soft_wrap=True)
    if not report.invariant:
        out.print(Text("  on this machine the bits depend on the batch: digests may differ without an error", "yellow"))
    if report.differences:
        out.print(Text("DIFFERENT", "bold red"))
        for one in report.differences[:SHOWN]:
            said = f"  session {one.session}, position {one.position}, batch {one.batch}: {one.said}"
            out.print(Text(said), soft_wrap=True)
        if (more := len(report.differences) - SHOWN) > 0:
            out.print(f"  and {more} more sessions")
    elif not report.tokens:
        out.print(Text("nothing could be compared", "bold yellow"))
    else:
        digests = "" if report.digests else " (no digests: recorded by verifiers without WISP_JOURNAL)"
        out.print(Text(f"identical, bit for bit{digests}", "bold green"), soft_wrap=True)
