"""Bad settings end a service at its start, with a message that says which and why."""

from __future__ import annotations

import sys

import pytest

from services.drafter.settings import DrafterSettings
from services.scheduler.settings import SchedulerSettings
from shared.runtime.settings import ServiceSettings, load


@pytest.mark.parametrize(
    ("kind", "environment", "said"),
    [
        (
            SchedulerSettings,
            {"WISP_POLICY": "nope"},
            "WISP_POLICY or --policy: Input should be 'sled', 'fcfs', 'edf', 'wisp' or 'wisp+'",
        ),
        (SchedulerSettings, {"WISP_MAX_BATCH_MS": "fast"}, "(given: 'fast')"),
        (SchedulerSettings, {"WISP_NAMESPACE": "a b"}, "WISP_NAMESPACE"),
        (DrafterSettings, {"WISP_DRAFT_SOURCE": "model"}, "  draft_source is 'model', so draft_model must name"),
        (DrafterSettings, {"WISP_STOP_RULE": "never"}, "Input should be 'fixed', 'entropy', 'predictor' or 'marginal'"),
        (DrafterSettings, {"WISP_HIDDEN_FORMAT": "int4"}, "Input should be 'bfloat16' or 'int8'"),
    ],
)
def test_bad_settings_are_named(
    kind: type[ServiceSettings],
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["service"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        load(kind, "service")
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "See `service --help`." in shown


def test_the_command_line_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_POLICY", "fcfs")
    monkeypatch.setattr(sys, "argv", ["service", "--policy", "edf", "--max-batch-ms", "50"])
    settings = load(SchedulerSettings, "service")
    assert (settings.policy, settings.max_batch_ms) == ("edf", 50.0)
