"""`wisp replay --inject`: send recorded requests to a suite in another virtual host."""

from __future__ import annotations

from dataclasses import asdict

from rich.text import Text

from services.tools.cli.core.text_parts import counted
from services.tools.cli.replay.recordings import print_notes
from services.tools.cli.terminal import out, print_fields, run
from services.tools.local.settings import BrokerAddresses
from services.tools.replayer.core.injection import InjectionReport
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.core.selection import find_session, select_sessions, session_ids_of
from services.tools.replayer.inject import in_vhost, inject
from shared.errors import SettingsError
from shared.runtime import logging
from shared.runtime.settings import ServiceSettings

SHOWN = 5


def inject_requests(
    recording: Recording,
    session: str | None,
    amqp_url: str,
    vhost: str | None,
    namespace: str | None,
    redis_url: str | None,
    speed: float,
    *,
    as_json: bool,
) -> bool:
    """Send the requests, print a report, and return whether every request gave the recorded completion.

    amqp_url: the live broker. Raises RecordingError, SettingsError and BrokersError.
    """
    if vhost is None:
        raise SettingsError("--inject needs a virtual host other than the live one: --vhost NAME")
    redis_url = redis_url or BrokerAddresses().redis_url
    if redis_url is None:
        raise SettingsError(
            "--inject needs the Redis of the suite in that virtual host: --redis-url, or WISP_REDIS_URL"
        )
    target_url = in_vhost(amqp_url, vhost)
    if session is not None:
        recording = select_sessions(recording, {find_session(session, session_ids_of(recording))})
    print_notes(recording)
    logging.configure("replay", "replay", "error", "console")
    space = namespace or str(ServiceSettings.model_fields["namespace"].default)
    report = run(lambda: inject(target_url, redis_url, space, recording, speed))
    same = not report.differing and set(report.ended) <= {"stop", "length", "cancelled"}
    if as_json:
        print_fields(out, {"same": same, **asdict(report)})
    else:
        _print(report)
    return same


def _print(report: InjectionReport) -> None:
    ends = ", ".join(f"{count} {end}" for end, count in report.ended.items())
    out.print(Text(f"{counted(report.requests, 'request')} sent again: {ends}"), soft_wrap=True)
    out.print(
        Text(
            f"  TTFT {_both(report.ttft_p50_ms)}, TPOT {_both(report.tpot_p50_ms)} (medians, recorded → now, without "
            f"the gateway); sent {report.late_ms:.0f} ms late at worst"
        ),
        soft_wrap=True,
    )
    if report.differing:
        out.print(Text(f"DIFFERENT completions in {counted(len(report.differing), 'session')}", "bold red"))
        for session, position in report.differing[:SHOWN]:
            out.print(Text(f"  session {session}, position {position}"), soft_wrap=True)
    else:
        out.print(Text(f"the same completions, {counted(report.compared, 'token')} compared", "bold green"))


def _both(times: tuple[float | None, float | None]) -> str:
    return " → ".join("-" if ms is None else f"{ms:.1f}" for ms in times) + " ms"
