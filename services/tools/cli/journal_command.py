"""`wisp journal` on the command line: recordings into files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.tools.cli.replay.command import AmqpUrl, Namespace, Since, Until, load, tell_notes, where
from services.tools.cli.terminal import errors_shown, out, run

app = typer.Typer(
    help="The recorded messages of a suite (WISP_JOURNAL=true): into a file, back, or away.", no_args_is_help=True
)


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="File to write: JSON lines, compressed if the name ends in .gz.")],
    without_text: Annotated[
        bool, typer.Option("--without-text", help="Remove text, tokens and seeds; lengths and times stay.")
    ] = False,
    session: Annotated[
        list[str] | None, typer.Option(help="Only what concerns this session; may be repeated. \\[default: all]")
    ] = None,
    since: Since = None,
    until: Until = None,
    namespace: Namespace = None,
    amqp_url: AmqpUrl = None,
    source: Annotated[
        Path | None, typer.Option("--file", help="Another recording, in place of the live journal.")
    ] = None,
) -> None:
    """Write the journal to a file. It holds users' tokens unless they are removed: treat it like their texts."""
    with errors_shown():
        from services.tools.replayer import files
        from services.tools.replayer.core.selection import find_session, select_sessions, session_ids_of

        recording = load(source, since, until, namespace, amqp_url)
        if session:
            known = session_ids_of(recording)
            recording = select_sessions(recording, {find_session(name, known) for name in session})
        written, left_out = files.write(file, recording, without_text=without_text)
        tell_notes(recording)
        more = f"; {left_out} are none of ours and were left out" if left_out else ""
        what = "without text and tokens" if without_text or recording.redacted else "with the users' tokens"
        out.print(f"{written} messages written to {file}, {what}{more}", soft_wrap=True, markup=False)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file by `wisp journal export`.")],
    namespace: Annotated[str, typer.Option(help="Namespace of the new journal; must have none yet.")],
    amqp_url: AmqpUrl = None,
) -> None:
    """Put a file into a new journal at a broker, for others to `wisp replay --namespace …`. No service sees it."""
    with errors_shown():
        from services.tools.replayer import files, journal
        from shared.broker.topology import JournalLimits
        from shared.runtime.settings import ServiceSettings

        recording = files.read(file)
        tell_notes(recording)
        place = where(namespace, amqp_url)
        fields = ServiceSettings.model_fields
        size = max(fields["journal_bytes"].default, 2 * sum(len(one.body) + 512 for one in recording.packed))
        limits = JournalLimits(size, int(fields["journal_hours"].default * 3600))
        run(lambda: journal.fill(place.amqp_url, namespace, recording, limits))
        out.print(f"{len(recording.packed)} messages are in the journal of namespace {namespace}", markup=False)


@app.command("delete")
def delete(namespace: Namespace = None, amqp_url: AmqpUrl = None) -> None:
    """Delete the journal and all that it holds. A suite that records begins a new one when it is started again."""
    with errors_shown():
        from services.tools.replayer import journal

        place = where(namespace, amqp_url)
        deleted = run(lambda: journal.delete(place.amqp_url, place.namespace))
        said = "deleted" if deleted else "there is none"
        out.print(f"journal of namespace {place.namespace}: {said}", markup=False)
