"""`wisp replay` and `wisp journal` on a file: their output and their refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recorded
from typer.testing import CliRunner, Result

from services.tools.cli import terminal
from services.tools.cli.main import app
from services.tools.replayer import files


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the terminal wide enough that no expected text is wrapped."""
    monkeypatch.setattr(terminal.out, "width", 200)
    monkeypatch.setattr(terminal.err, "width", 200)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "recording.jsonl.gz"
    files.write(path, recorded.recording(recorded.sent()))
    return str(path)


def wisp(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


def test_without_the_model_tokens_are_shown_as_numbers(file: str, tmp_path: Path) -> None:
    shown = wisp("replay", "aaaa", "--file", file, "--target", str(tmp_path / "none"))
    assert shown.exit_code == 0, shown.output
    assert "note: tokens are shown as numbers" in shown.stderr
    assert "accepted: '<12>'; rejected: '<13>'; trimmed: '<14>' '<15>'; bonus: '<99>'" in shown.stdout


def test_the_time_span_limits_the_rounds(file: str) -> None:
    shown = json.loads(wisp("replay", "--file", file, "--until", "2025-11-24T16:00:00.074+00:00", "--json").stdout)
    assert [len(one["rounds"]) for one in shown] == [1, 1, 1]


def test_one_session_is_exported_to_another_file(file: str, tmp_path: Path) -> None:
    part = tmp_path / "part.jsonl"
    shown = wisp("journal", "export", str(part), "--file", file, "--session", "bbbb", "--without-text")
    assert shown.exit_code == 0, shown.output
    assert "5 messages written" in shown.stdout  # a heartbeat, a load, and the session's round, batch and result
    assert files.read(part).redacted


def test_other_policies_are_compared(file: str) -> None:
    shown = json.loads(wisp("replay", "--file", file, "--policy", "edf", "--draft-length", "1", "--json").stdout)
    assert list(shown["runs"]) == ["recorded", "wisp+ again", "edf, drafts of at most 1"]
    assert shown["left_out"] == {"their beginning is not in the recording": 2}
    assert [run["tokens"] for run in shown["runs"].values()] == [3, 3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verify", "--policy", "edf"], "--verify and --policy exclude each other"),
        (["aaaa", "--policy", "edf"], "--policy replays all sessions"),
        (["--steps"], "name a session, or give --all"),
        (["--policy", "best"], "no policy 'best' can be replayed: sled, fcfs, edf, wisp, wisp+"),
        (["--stop-rule", "entropy"], "no stop rule 'entropy' can be replayed"),
        (["--vhost", "x"], "belong to --inject"),
        (["--inject"], "needs a virtual host other than the live one"),
        (["--inject", "--vhost", "x"], "needs the Redis of the suite"),
        (["--inject", "--vhost", "/", "--redis-url", "redis://x"], "so it is the live one"),
        (["--since", "yesterday"], "'yesterday' is no point in time"),
        (["nobody"], "no session 'nobody' in the recording, which has 3"),
        (["--trace", "/nowhere/trace.json"], "cannot write the trace"),
    ],
)
def test_a_refusal_names_its_reason(file: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WISP_AMQP_URL", "WISP_REDIS_URL", "WISP_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    shown = wisp("replay", "--file", file, *words)
    assert shown.exit_code == 1
    assert message in shown.stderr
