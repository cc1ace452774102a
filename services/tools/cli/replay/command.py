"""`wisp replay` on the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from services.tools.cli.terminal import err, errors_shown, out, require, run
from shared.errors import SettingsError

if TYPE_CHECKING:
    from services.tools.cli.replay.timeline_view import Words
    from services.tools.cli.suite_address import SuiteAddress
    from services.tools.replayer.core.recording import Recording
    from services.tools.replayer.core.sessions import RecordedSession

Namespace = Annotated[
    str | None, typer.Option(help="The suite's prefix. \\[env: WISP_NAMESPACE; default: of the suite running here]")
]
AmqpUrl = Annotated[
    str | None, typer.Option(help="Its RabbitMQ. \\[env: WISP_AMQP_URL; default: of the suite running here]")
]
File = Annotated[Path | None, typer.Option(help="A recording by `wisp journal export`, in place of the live journal.")]
Since = Annotated[str | None, typer.Option(help="From when on: 90s, 10m, 2h (ago), or 2026-11-25T14:30.")]
Until = Annotated[str | None, typer.Option(help="Until when; as --since.")]


def replay(
    session: Annotated[
        str | None, typer.Argument(help="Name of a session, or its beginning. \\[default: list them]")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The timelines of all sessions.")] = False,
    since: Since = None,
    until: Until = None,
    file: File = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for Perfetto (ui.perfetto.dev) or speedscope.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compute the batches again and compare bit for bit; status 1 if they differ."),
    ] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="What this batch policy would have made of the same requests; may be repeated."),
    ] = None,
    stop_rule: Annotated[
        str | None, typer.Option(help="With this stop rule: marginal decides anew how much of each draft is sent.")
    ] = None,
    draft_length: Annotated[
        int | None, typer.Option(min=0, help="With drafts cut to this length; 0 is plain decoding.")
    ] = None,
    inject: Annotated[
        bool,
        typer.Option("--inject", help="Ask the recorded requests again of a suite in another virtual host (--vhost)."),
    ] = False,
    vhost: Annotated[str | None, typer.Option(help="For --inject: the virtual host; never the live one.")] = None,
    into: Annotated[
        str | None, typer.Option(help="For --inject: the namespace of the suite there. \\[default: wisp]")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="For --inject: the Redis of the suite there. \\[env: WISP_REDIS_URL]")
    ] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="For --inject: times as fast as they came.")] = 1.0,
    target: Annotated[
        str | None, typer.Option(help="The target model, for --verify and the text of tokens. \\[env: WISP_TARGET]")
    ] = None,
    namespace: Namespace = None,
    amqp_url: AmqpUrl = None,
) -> None:
    """Show recorded sessions: each hop and round with its time, its draft, its batch, and where the time went."""
    with errors_shown():
        from services.tools.cli.paint import Painter
        from services.tools.cli.replay.timeline_view import listing, told, view
        from services.tools.replayer.core.timeline import timeline

        asked_what_if = bool(policy) or stop_rule is not None or draft_length is not None
        _require_one({"--verify": verify, "--policy": asked_what_if, "--inject": inject, "--trace": trace is not None})
        if asked_what_if and session is not None:
            raise SettingsError("--policy plays all sessions, since they share batches; choose by --since and --until")
        if not inject and (vhost, into, redis_url, speed) != (None, None, None, 1.0):
            raise SettingsError("--vhost, --into, --redis-url and --speed belong to --inject")
        recording = load(file, since, until, namespace, amqp_url)
        if verify:
            require("model")
            from services.tools.cli.replay.verify import show

            if not show(recording, session, target, as_json=as_json):
                raise typer.Exit(1)
            return
        if inject:
            from services.tools.cli.replay.inject import ask_again

            place = where(namespace, amqp_url)
            if not ask_again(recording, session, place.amqp_url, vhost, into, redis_url, speed, as_json=as_json):
                raise typer.Exit(1)
            return
        if asked_what_if:
            from services.tools.cli.replay.policy import compare

            compare(recording, policy or [], stop_rule, draft_length, as_json=as_json)
            return
        lives = _chosen(recording, session)
        tell_notes(recording)
        if trace is not None:
            from services.tools.replayer.files import write_trace

            write_trace(trace, lives)
            err.print(Text(f"trace of {len(lives)} sessions written to {trace}; open it at https://ui.perfetto.dev"))
        timelines = [timeline(life) for life in lives]
        vocabularies = {life.generate.vocab_fingerprint for life in lives if life.generate}
        words = words_of(target, vocabularies, recording)
        if as_json:
            out.print_json(json.dumps([told(one, words) for one in timelines], allow_nan=False), indent=1)
        elif session is not None or every:
            painter = Painter(out)
            for one in timelines:
                out.print(view(one, words, painter))
                out.print()
        elif trace is None:
            out.print(listing(timelines))


def _require_one(asked: dict[str, bool]) -> None:
    given = [name for name, wanted in asked.items() if wanted]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} are different things to do: ask for one of them")


def where(namespace: str | None, amqp_url: str | None) -> SuiteAddress:
    """The suite that is meant."""
    from services.tools.cli.suite_address import choose_suite
    from services.tools.local.folder import running_suites
    from services.tools.local.settings import BrokerAddresses, LocalSettings

    return choose_suite(
        amqp_url or BrokerAddresses().amqp_url, namespace or LocalSettings().namespace, running_suites()
    )


def load(
    file: Path | None, since: str | None, until: str | None, namespace: str | None, amqp_url: str | None
) -> Recording:
    """The recording that the options name."""
    from services.tools.replayer import files, journal
    from services.tools.replayer.times import parse_time_ms
    from shared.runtime import logging

    now_ms = time.time() * 1000
    since_ms = None if since is None else parse_time_ms(since, now_ms)
    until_ms = None if until is None else parse_time_ms(until, now_ms)
    if file is not None:
        return files.read(file).within(since_ms, until_ms)
    logging.configure("replay", "replay", "error", "console")
    place = where(namespace, amqp_url)
    return run(lambda: journal.read(place.amqp_url, place.namespace, since_ms)).within(None, until_ms)


def tell_notes(recording: Recording) -> None:
    """Say what is wrong with a recording, if anything is."""
    for note in recording.notes:
        err.print(Text.assemble(("note: ", "bold yellow"), note), soft_wrap=True)
    if recording.skipped:
        count = sum(recording.skipped.values())
        reason, _ = recording.skipped.most_common(1)[0]
        err.print(
            Text.assemble(
                ("note: ", "bold yellow"), f"{count} recorded messages were skipped, as they are none of ours: {reason}"
            ),
            soft_wrap=True,
        )


def _chosen(recording: Recording, session: str | None) -> list[RecordedSession]:
    """The lives that are wanted, in the order in which they began."""
    from services.tools.replayer.core.selection import find_session
    from services.tools.replayer.core.sessions import read_sessions

    lives = read_sessions(recording.entries())
    if session is not None:
        return [lives[find_session(session, lives)]]
    return sorted(lives.values(), key=lambda life: (life.start_ms or 0.0, life.session_id))


def words_of(target: str | None, vocabularies: set[str], recording: Recording) -> Words:
    """What tokens are called: their text, where the target's vocabulary is to be had.

    vocabularies: fingerprints of those that were used in the recording.
    """
    if recording.redacted:
        return lambda _: "·"
    from services.tools.local.progress import Progress
    from services.tools.local.settings import LocalSettings
    from services.tools.local.target import prepare_target
    from shared.errors import WispError
    from shared.models.folder import ModelFolder

    name = target or LocalSettings().target
    try:
        from shared.models.text import Tokenizer

        folder = ModelFolder(prepare_target(name, Progress()))
        if vocabularies - {folder.vocab_fingerprint}:
            raise WispError("the recording is of a model with another vocabulary")
        tokenizer = Tokenizer(folder)
    except (WispError, ImportError) as error:
        err.print(
            Text.assemble(("note: ", "bold yellow"), f"tokens are shown as numbers: {error}; name the model: --target"),
            soft_wrap=True,
        )
        return lambda token: f"<{token}>"
    control = {index: text for text, index in tokenizer.special_tokens.items()}
    return lambda token: control.get(token) or tokenizer.token_bytes(token).decode("utf-8", "replace")
