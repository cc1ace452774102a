"""`wisp journal`: recordings into files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.tools.cli.program import Program
from services.tools.cli.replay.options import Since, Until
from services.tools.cli.shared_options import AmqpUrlOption, NamespaceOption, RecordingFileOption
from services.tools.cli.terminal import errors_shown, out, run

app = Program(help="Export, import or delete a suite's recorded messages (WISP_JOURNAL=true).", no_args_is_help=True)


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="File to write: JSON lines, compressed if the name ends in .gz.")],
    without_text: Annotated[
        bool, typer.Option("--without-text", help="Remove text, tokens and seeds; keep lengths and times.")
    ] = False,
    session: Annotated[
        list[str] | None, typer.Option(help="Only the messages of this session; may be repeated. \\[default: all]")
    ] = None,
    since: Since = None,
    until: Until = None,
    namespace: NamespaceOption = None,
    amqp_url: AmqpUrlOption = None,
    source: RecordingFileOption = None,
) -> None:
    """Write the journal to a file. It holds the users' tokens unless they are removed: protect it like their text."""
    with errors_shown():
        from services.tools.cli.replay.recordings import load_recording, print_notes
        from services.tools.replayer import files
        from services.tools.replayer.core.selection import find_session, select_sessions, session_ids_of

        recording = load_recording(source, since, until, namespace, amqp_url)
        if session:
            known = session_ids_of(recording)
            recording = select_sessions(recording, {find_session(name, known) for name in session})
        written, left_out = files.write(file, recording, without_text=without_text)
        print_notes(recording)
        more = f"; {left_out} are not WISP's and were left out" if left_out else ""
        what = "without text and tokens" if without_text or recording.redacted else "with the users' tokens"
        out.print(f"{written} messages written to {file}, {what}{more}", soft_wrap=True, markup=False)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file by `wisp journal export`.")],
    namespace: Annotated[str, typer.Option(help="Namespace of the new journal; it must not have a journal.")],
    amqp_url: AmqpUrlOption = None,
) -> None:
    """Put a file into a new journal at a broker, for `wisp replay --namespace …`. No service receives it."""
    with errors_shown():
        from services.tools.cli.replay.recordings import print_notes, suite_address
        from services.tools.replayer import files, journal
        from shared.broker.topology import JournalLimits
        from shared.runtime.settings import ServiceSettings

        recording = files.read(file)
        print_notes(recording)
        suite = suite_address(namespace, amqp_url)
        fields = ServiceSettings.model_fields
        size = max(fields["journal_bytes"].default, 2 * sum(len(one.body) + 512 for one in recording.packed))
        limits = JournalLimits(size, int(fields["journal_hours"].default * 3600))
        run(lambda: journal.fill(suite.amqp_url, namespace, recording, limits))
        out.print(f"{len(recording.packed)} messages are in the journal of namespace {namespace}", markup=False)


@app.command("delete")
def delete(namespace: NamespaceOption = None, amqp_url: AmqpUrlOption = None) -> None:
    """Delete the journal with its messages. A recording suite begins a new one at its next start."""
    with errors_shown():
        from services.tools.cli.replay.recordings import suite_address
        from services.tools.replayer import journal

        suite = suite_address(namespace, amqp_url)
        deleted = run(lambda: journal.delete(suite.amqp_url, suite.namespace))
        outcome = "deleted" if deleted else "there is none"
        out.print(f"journal of namespace {suite.namespace}: {outcome}", markup=False)
