"""Settings: each service has those that it uses, and invalid ones end it at its start with an explanation."""

from __future__ import annotations

import sys

import pytest

from services.device.settings import DeviceSettings
from services.drafter.settings import DrafterSettings
from services.drain_order.settings import DrainOrderSettings
from services.estimator.settings import EstimatorSettings
from services.scheduler.settings import SchedulerSettings
from shared.runtime.settings import WispSettings, load


@pytest.mark.parametrize(
    ("kind", "environment", "message"),
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
def test_an_invalid_setting_is_named(
    kind: type[WispSettings],
    environment: dict[str, str],
    message: str,
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
    assert message in shown
    assert "See `service --help`." in shown


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        (DrainOrderSettings, {"amqp_url", "journal", "session_ttl_s"}),
        (EstimatorSettings, {"session_ttl_s", "session_secret", "target"}),
        (SchedulerSettings, {"session_ttl_s", "target"}),
        (DrafterSettings, {"session_ttl_s", "session_secret"}),
        (DeviceSettings, {"redis_url", "pool", "journal", "session_secret"}),
    ],
)
def test_a_service_has_no_settings_that_it_does_not_use(kind: type[WispSettings], unused: set[str]) -> None:
    assert unused & kind.model_fields.keys() == set()


def test_the_command_line_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WISP_POLICY", "fcfs")
    monkeypatch.setattr(sys, "argv", ["service", "--policy", "edf", "--max-batch-ms", "50"])
    settings = load(SchedulerSettings, "service")
    assert (settings.policy, settings.max_batch_ms) == ("edf", 50.0)
