"""Progress of long steps: the time is seen to pass, whatever a step reports."""

from __future__ import annotations

import io
import re
import time

import pytest
from patience import HANG_S
from rich.console import Console

from services.tools.local import progress
from services.tools.local.progress import ConsoleProgress


def test_a_silent_step_repeats_what_it_does_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_S", 0.01)
    file = io.StringIO()
    with ConsoleProgress(Console(file=file)).step("compiling [kernels]") as step:
        wait_for(file, "still at it (")
        step.detail("loop [3] of 9")
        wait_for(file, "loop [3] of 9 (")
    assert file.getvalue().splitlines()[-1].startswith("  compiling"), "nothing follows the end"


def wait_for(file: io.StringIO, text: str) -> None:
    ends_s = time.monotonic() + HANG_S
    while text not in file.getvalue():
        assert time.monotonic() < ends_s, file.getvalue()
        time.sleep(0.005)


def test_the_line_beside_a_spinner_has_the_time_that_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOWN_FROM_S", HANG_S)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with ConsoleProgress(console).step("compiling") as step:
        console.print(step)
        step.started -= HANG_S
        step.detail("loop [3] of 9")
        console.print(step)
    lines = [line for line in file.getvalue().splitlines() if "compiling" in line]
    assert not any(" s" in line for line in lines[:2]), "a short step needs no time"
    assert any("loop [3] of 9" in line and re.search(r"30\d s", line) for line in lines)
