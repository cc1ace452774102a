"""`wisp replay` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from services.tools.cli.replay.options import (
    AsJsonOption,
    DraftLengthOption,
    EveryOption,
    InjectOption,
    IntoOption,
    PolicyOption,
    RedisUrlOption,
    SessionArgument,
    SessionsOption,
    Since,
    SpeedOption,
    StepsOption,
    StopRuleOption,
    TargetOption,
    TimeLimitOption,
    TraceOption,
    Until,
    VerifyOption,
    VhostOption,
)
from services.tools.cli.shared_options import AmqpUrlOption, NamespaceOption, RecordingFileOption
from services.tools.cli.terminal import err, errors_shown, out, print_fields, require
from shared.errors import SettingsError

if TYPE_CHECKING:
    from services.tools.replayer.core.recording import Recording
    from services.tools.replayer.core.sessions import RecordedSession

VERIFY_LIMIT_S = 600.0
"""Default limit on the time of --verify."""


def replay(
    session: SessionArgument = None,
    every: EveryOption = False,
    steps: StepsOption = False,
    since: Since = None,
    until: Until = None,
    file: RecordingFileOption = None,
    as_json: AsJsonOption = False,
    trace: TraceOption = None,
    verify: VerifyOption = False,
    sessions: SessionsOption = None,
    time_limit: TimeLimitOption = None,
    policy: PolicyOption = None,
    stop_rule: StopRuleOption = None,
    draft_length: DraftLengthOption = None,
    inject: InjectOption = False,
    vhost: VhostOption = None,
    into: IntoOption = None,
    redis_url: RedisUrlOption = None,
    speed: SpeedOption = 1.0,
    target: TargetOption = None,
    namespace: NamespaceOption = None,
    amqp_url: AmqpUrlOption = None,
) -> None:
    """Show recorded sessions: each hop and round with its time, draft and batch, and the shares of the total time."""
    with errors_shown():
        from services.tools.cli.replay.recordings import load_recording, suite_address

        asked_what_if = bool(policy) or stop_rule is not None or draft_length is not None
        _require_one({"--verify": verify, "--policy": asked_what_if, "--inject": inject, "--trace": trace is not None})
        if asked_what_if and session is not None:
            raise SettingsError(
                "--policy replays all sessions, because they share batches; choose with --since, --until"
            )
        of_inject = (vhost, into, redis_url, speed) != (None, None, None, 1.0)
        _refuse_strays(inject, verify, of_inject=of_inject, of_verify=(sessions, time_limit) != (None, None))
        if steps and (as_json or (session is None and not every)):
            raise SettingsError("--steps shows timelines in more detail: name a session, or give --all; JSON has all")
        recording = load_recording(file, since, until, namespace, amqp_url)
        if verify:
            require("model")
            from services.tools.cli.replay.verify import verify_recording

            limit_s = VERIFY_LIMIT_S if time_limit is None else time_limit
            if status := verify_recording(
                recording, session, target, most_sessions=sessions, time_limit_s=limit_s, as_json=as_json
            ):
                raise typer.Exit(status)
        elif inject:
            from services.tools.cli.replay.inject import inject_requests

            live = suite_address(namespace, amqp_url)
            if not inject_requests(recording, session, live.amqp_url, vhost, into, redis_url, speed, as_json=as_json):
                raise typer.Exit(1)
        elif asked_what_if:
            from services.tools.cli.replay.policy import compare_policies

            compare_policies(recording, policy or [], stop_rule, draft_length, as_json=as_json)
        else:
            _show_sessions(recording, session, target, trace, as_json=as_json, every=every, steps=steps)


def _refuse_strays(inject: bool, verify: bool, *, of_inject: bool, of_verify: bool) -> None:
    """Raise SettingsError for options of --inject or --verify without it."""
    if of_inject and not inject:
        raise SettingsError("--vhost, --into, --redis-url and --speed belong to --inject")
    if of_verify and not verify:
        raise SettingsError("--sessions and --time-limit belong to --verify")


def _show_sessions(
    recording: Recording,
    session: str | None,
    target: str | None,
    trace: Path | None,
    *,
    as_json: bool,
    every: bool,
    steps: bool,
) -> None:
    """Print timelines of one or every session, or the list of sessions; write a trace where asked."""
    from services.tools.cli.paint import Painter
    from services.tools.cli.replay.recordings import print_notes, token_texts
    from services.tools.cli.replay.timeline_view import session_table, timeline_fields, timeline_view
    from services.tools.replayer.core.timeline import timeline

    sessions = _chosen(recording, session)
    print_notes(recording)
    if trace is not None:
        from services.tools.replayer.files import write_trace

        write_trace(trace, sessions)
        err.print(Text(f"trace of {len(sessions)} sessions written to {trace}; open it at https://ui.perfetto.dev"))
    timelines = [timeline(one) for one in sessions]
    words = token_texts(target, {one.generate.vocab_fingerprint for one in sessions if one.generate}, recording)
    if as_json:
        print_fields(out, [timeline_fields(one, words) for one in timelines])
    elif session is not None or every:
        style = Painter(out).style
        for one in timelines:
            out.print(timeline_view(one, words, style, steps=steps))
            out.print()
    elif trace is None:
        out.print(session_table(timelines))


def _require_one(asked: dict[str, bool]) -> None:
    given = [name for name, wanted in asked.items() if wanted]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} exclude each other: choose one of them")


def _chosen(recording: Recording, session: str | None) -> list[RecordedSession]:
    """Return the chosen session, or all in the order of their beginnings."""
    from services.tools.replayer.core.selection import find_session
    from services.tools.replayer.core.sessions import read_sessions

    sessions = read_sessions(recording.entries())
    if session is not None:
        return [sessions[find_session(session, sessions)]]
    return sorted(sessions.values(), key=lambda one: (one.start_ms or 0.0, one.session_id))
