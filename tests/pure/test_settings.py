"""Settings: each service has those that it uses, and invalid ones end it at its start with an explanation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from services.baseline.settings import BaselineSettings
from services.device.settings import DeviceSettings
from services.drafter.settings import DrafterSettings
from services.drain_order.settings import DrainOrderSettings
from services.estimator.settings import EstimatorSettings
from services.gateway.settings import GatewaySettings
from services.scheduler.settings import SchedulerSettings
from services.tools.local.service_settings import CLASSES, settings_class
from services.tools.local.settings import BrokerAddresses, LocalSettings
from services.verifier.settings import VerifierSettings
from shared.runtime.settings import WispSettings, variable, variables
from shared.runtime.settings_loading import load, misspelt


@pytest.mark.parametrize(
    ("kind", "environment", "message"),
    [
        (
            SchedulerSettings,
            {"WISP_POLICY": "nope"},
            "WISP_POLICY or --policy: must be 'sled', 'fcfs', 'edf', 'wisp', 'wisp+' or 'adaserve'",
        ),
        (SchedulerSettings, {"WISP_MAX_BATCH_MS": "fast"}, "(given: 'fast')"),
        (SchedulerSettings, {"WISP_NAMESPACE": "a b"}, "WISP_NAMESPACE"),
        (DrafterSettings, {"WISP_DRAFT_SOURCE": "model"}, "  draft_source is 'model', so draft_model must name"),
        (DrafterSettings, {"WISP_STOP_RULE": "never"}, "must be 'fixed', 'entropy', 'predictor' or 'marginal'"),
        (SchedulerSettings, {"WISP_WITHOUT": "trimming"}, "as JSON (given: 'trimming'); for example WISP_WITHOUT=[\""),
        (
            VerifierSettings,
            {"WISP_EMULATED_COST": "3"},
            "(given: 3); for example WISP_EMULATED_COST=[20, 0, 0, 0, 0, 0, 0]",
        ),
        (GatewaySettings, {"WISP_SLO_CLASSES": "x"}, 'for example WISP_SLO_CLASSES={"priority": {"ttft_ms": 500,'),
        (
            GatewaySettings,
            {"WISP_SLO_CLASSES": '{"default": {"ttft_ms": "x", "tpot_ms": 1}}'},
            "WISP_SLO_CLASSES or --slo-classes at default.ttft_ms: ",
        ),
        (GatewaySettings, {"WISP_KEY_MAX_SESSIONS": "many"}, "for example WISP_KEY_MAX_SESSIONS=1"),
        (DrafterSettings, {"WISP_HIDDEN_FORMAT": "int4"}, "must be 'bfloat16' or 'int8'"),
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


SERVICES: list[type[WispSettings]] = [
    GatewaySettings,
    DrafterSettings,
    SchedulerSettings,
    EstimatorSettings,
    VerifierSettings,
    DrainOrderSettings,
    BaselineSettings,
]


@pytest.mark.parametrize("kind", [*SERVICES, BrokerAddresses, LocalSettings])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_is_unset(kind: type[WispSettings], empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = kind()
    for name in (*map(variable, kind.model_fields), "OPENAI_API_KEY"):
        monkeypatch.setenv(name, empty)
    assert kind() == usual


def test_an_option_that_cannot_be_parsed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["service", "--slo-classes", "x"])
    with pytest.raises(SystemExit):
        load(GatewaySettings, "service")
    assert "--slo-classes cannot be read; for example WISP_SLO_CLASSES={" in capsys.readouterr().err


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


@pytest.mark.parametrize("kind", [settings_class(service) for service in CLASSES])
def test_no_setting_looks_like_a_misspelt_one_of_another_service(kind: type[WispSettings]) -> None:
    every = [LocalSettings, *map(settings_class, CLASSES)]
    environment = {name: "1" for other in every for name in variables(other)} | {
        # Kubernetes sets these for services called wisp and wisp-gateway.
        f"WISP_{name}": "tcp://10.0.0.1:80"
        for name in ("SERVICE_HOST", "SERVICE_PORT", "PORT_80_TCP", "GATEWAY_SERVICE_HOST", "GATEWAY_PORT_80_TCP_ADDR")
    }
    assert misspelt(environment, variables(kind)) == {}


SERVICE = """
from shared.runtime import service, settings


async def serve(*_):
    pass


service.run("estimator", settings.ProcessSettings, serve)
"""


def test_a_service_logs_a_misspelt_variable_and_goes_on() -> None:
    environment = os.environ | {"WISP_LOGLEVEL": "debug", "WISP_SERVICE_HOST": "10.0.0.1"}
    ended = subprocess.run([sys.executable, "-c", SERVICE], env=environment, capture_output=True, text=True, check=True)
    warnings = [line for line in map(json.loads, ended.stderr.splitlines()) if line["level"] == "warning"]
    assert [(line["variable"], line["meant"]) for line in warnings] == [("WISP_LOGLEVEL", "WISP_LOG_LEVEL")]
