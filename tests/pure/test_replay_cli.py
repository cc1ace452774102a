"""`wisp replay` and `wisp journal` on a file: what they print, and what they refuse."""

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
    """Nothing that is looked for is broken into lines, however wide the terminal is that the tests run in."""
    monkeypatch.setattr(terminal.out, "width", 200)
    monkeypatch.setattr(terminal.err, "width", 200)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "recording.jsonl.gz"
    files.write(path, recorded.recording(recorded.sent()))
    return str(path)


def wisp(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


def test_without_the_model_tokens_are_numbers_and_that_is_said(file: str, tmp_path: Path) -> None:
    told = wisp("replay", "aaaa", "--file", file, "--target", str(tmp_path / "none"))
    assert told.exit_code == 0, told.output
    assert "note: tokens are shown as numbers" in told.stderr
    assert "accepted: '<12>'; rejected: '<13>'; trimmed: '<14>' '<15>'; bonus: '<99>'" in told.stdout


def test_a_span_of_the_recording(file: str) -> None:
    told = json.loads(wisp("replay", "--file", file, "--until", "2025-11-24T16:00:00.074+00:00", "--json").stdout)
    assert [len(one["rounds"]) for one in told] == [1, 1, 1]


def test_one_session_of_a_file_into_another(file: str, tmp_path: Path) -> None:
    part = tmp_path / "part.jsonl"
    told = wisp("journal", "export", str(part), "--file", file, "--session", "bbbb", "--without-text")
    assert told.exit_code == 0, told.output
    assert "5 messages written" in told.stdout  # a heartbeat, a price, its round, its batch, its result
    assert files.read(part).redacted


def test_other_policies_in_figures(file: str) -> None:
    told = json.loads(wisp("replay", "--file", file, "--policy", "edf", "--draft-length", "1", "--json").stdout)
    assert list(told["runs"]) == ["recorded", "wisp+ again", "edf, drafts of at most 1"]
    assert told["left_out"] == {"their beginning is not in the recording": 2}
    assert [run["tokens"] for run in told["runs"].values()] == [3, 3, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--verify", "--policy", "edf"], "--verify and --policy are different things to do"),
        (["aaaa", "--policy", "edf"], "--policy plays all sessions"),
        (["--policy", "best"], "no policy 'best' can be replayed: sled, fcfs, edf, wisp, wisp+"),
        (["--stop-rule", "entropy"], "no stop rule 'entropy' can be replayed"),
        (["--vhost", "x"], "belong to --inject"),
        (["--inject"], "say into which virtual host"),
        (["--inject", "--vhost", "x"], "say where the Redis"),
        (["--inject", "--vhost", "/", "--redis-url", "redis://x"], "so it is the live one"),
        (["--since", "yesterday"], "'yesterday' is no point in time"),
        (["nobody"], "no session 'nobody' in the recording, which has 3"),
        (["--trace", "/nowhere/trace.json"], "cannot write the trace"),
    ],
)
def test_what_cannot_be_done_says_why(file: str, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WISP_AMQP_URL", "WISP_REDIS_URL", "WISP_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    told = wisp("replay", "--file", file, *words)
    assert told.exit_code == 1
    assert said in told.stderr
