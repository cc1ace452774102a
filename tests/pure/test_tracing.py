"""Traces: what switches them on, the contexts in headers, what is sampled, and what a process without them does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import builders
import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from otlp import Recorded, recording
from pamqp.encode import field_table as encode_table

from services.scheduler.queue_spans import QueueSpans
from shared.errors import SettingsError
from shared.runtime import tracing
from shared.runtime.tracing import NO_SPAN, exporter_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = f"00-{TRACE}-b7ad6b7169203331-01"
NOT_SAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"


@pytest.fixture
def spans() -> Iterator[Recorded]:
    with recording() as recorded:
        yield recorded


@pytest.mark.parametrize(
    ("environment", "exporter"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "mine", "OTEL_TRACES_SAMPLER": "always_on"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector/v1/traces"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "otlp"),
    ],
)
def test_opentelemetrys_own_variables_switch_traces_on(environment: dict[str, str], exporter: str | None) -> None:
    assert exporter_of(environment) == exporter


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "OTEL_EXPORTER_OTLP_ENDPOINT is no HTTP URL"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:99999"}, "OTEL_EXPORTER_OTLP_ENDPOINT is no HTTP URL"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf only"),
    ],
)
def test_unusable_settings_are_refused(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        exporter_of(environment)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "many"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER", "nobody"),
    ],
)
def test_variables_that_opentelemetry_refuses_are_wrong_settings(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match="OpenTelemetry refuses one of its variables"):
        tracing.configure("gateway", "g")
    assert not tracing.is_on()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PATH": "", **environment}
    )


WITHOUT_SDK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from shared.runtime import service, settings
async def serve(*_):
    print("served")
sys.argv = ["test"]
service.run("estimator", settings.ProcessSettings, serve)
"""


@pytest.mark.slow
def test_a_service_without_packages_names_the_extra_to_install() -> None:
    done = python(WITHOUT_SDK, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318")
    assert (done.returncode, done.stdout) == (2, "")
    assert "install wisp[otel], or set OTEL_TRACES_EXPORTER=none" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_service_without_traces_does_without_the_packages() -> None:
    done = python(WITHOUT_SDK)
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr


def test_log_lines_within_a_span_have_its_ids() -> None:
    code = f"""
import sys
from shared.runtime import logging, service, settings, tracing
async def serve(*_):
    logging.get().info("outside")
    span = tracing.begin("work", {{"traceparent": "{CLIENT}"}})
    with tracing.active(span):
        logging.get().info("inside")
    span.end()
sys.argv = ["test"]
service.run("estimator", settings.ProcessSettings, serve)
"""
    done = python(code, OTEL_TRACES_EXPORTER="console", OTEL_SERVICE_NAME="mine")
    lines = {line["event"]: line for line in map(json.loads, done.stderr.splitlines())}
    assert "trace_id" not in lines["outside"]
    assert lines["inside"]["trace_id"] == TRACE
    span = json.loads(done.stdout)
    assert span["context"]["trace_id"] == f"0x{TRACE}"
    assert span["context"]["span_id"] == f"0x{lines['inside']['span_id']}"
    assert span["resource"]["attributes"]["service.name"] == "mine"
    assert span["resource"]["attributes"]["wisp.service"] == "estimator"


def test_a_clients_trace_goes_on(spans: Recorded) -> None:
    span = tracing.begin("request", {"traceparent": CLIENT, "tracestate": "vendor=1"})
    assert span.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert span.headers["tracestate"] == "vendor=1"
    with tracing.received({"traceparent": span.headers["traceparent"]}):
        tracing.current().child("round").end()
    span.end()
    child, parent = spans.ended
    assert parent.parent is not None
    assert child.parent is not None
    assert f"{parent.parent.span_id:016x}" == "b7ad6b7169203331"
    assert child.parent.span_id == parent.context.span_id
    assert child.parent.is_remote


@pytest.mark.parametrize("header", [None, "", "nonsense", 5, b"bytes", f"00-{'0' * 32}-{'0' * 16}-01"])
def test_a_message_without_a_context_begins_no_trace(spans: Recorded, header: object) -> None:
    with tracing.received({} if header is None else {"traceparent": header}):
        assert not tracing.current()
        tracing.current().child("round").end()
    assert spans.ended == []


@pytest.mark.parametrize("state", [5, b"vendor=1", ["vendor=1"], [5], {"vendor": 1}, None])
def test_a_message_whose_state_is_no_text_has_its_context(spans: Recorded, state: object) -> None:
    headers = {"traceparent": CLIENT, "tracestate": state}
    with tracing.received({**headers, tracing.SESSIONS_HEADER: {"s": headers}}):
        assert tracing.current().headers == {"traceparent": CLIENT}
        assert [span.headers for span in tracing.session_spans().values()] == [{"traceparent": CLIENT}]


def test_a_request_that_is_not_sampled_sends_no_context() -> None:
    for sampler, headers in ((ALWAYS_OFF, {}), (None, {"traceparent": NOT_SAMPLED})):
        with recording(None if sampler is None else ParentBased(sampler)) as recorded:
            span = tracing.begin("request", headers)
            assert span is NO_SPAN
            assert not span.headers
            span.end()
            assert recorded.ended == []
    assert tracing.headers_of({}) == {}


def test_without_traces_nothing_is_sent_or_read() -> None:
    assert not tracing.is_on()
    assert tracing.begin("request", {"traceparent": CLIENT}) is NO_SPAN
    with tracing.received({"traceparent": CLIENT}):
        assert tracing.current() is NO_SPAN
        assert tracing.session_spans() == {}


def test_a_batch_carries_the_context_of_each_session(spans: Recorded) -> None:
    queued = QueueSpans()
    rounds = {name: tracing.begin("round", {}) for name in ("a", "b")}
    for name, span in rounds.items():
        with tracing.received(span.headers):
            queued.arrived(builders.verify(name, 3, 10))
    queued.arrived(builders.verify("untraced", 3, 10))
    batch = builders.batch("b1", *(builders.job(name, 3, 10) for name in ("a", "b", "untraced")))
    headers = queued.sent(batch, "v1")
    with tracing.received(headers):
        assert {name: span.ids for name, span in tracing.session_spans().items()} == {
            name: span.ids for name, span in rounds.items()
        }
    made = spans.ended
    assert [span.name for span in made] == ["queue", "queue"]
    assert {span.context.trace_id for span in made} == {int(span.ids["trace_id"], 16) for span in rounds.values()}
    assert {span.attributes["wisp.batch"] for span in made if span.attributes} == {"b1"}
    queued.forget("a")
    queued.forget("b")
    assert not queued


def test_the_contexts_of_a_large_batch_fit_into_an_amqp_frame(spans: Recorded) -> None:
    client = {"traceparent": CLIENT, "tracestate": ",".join(f"vendor{n}={'x' * 200}" for n in range(8))}
    rounds = {f"chatcmpl-{n:024x}": tracing.begin("round", client) for n in range(300)}
    headers = tracing.headers_of(rounds)
    assert 10 < len(headers[tracing.SESSIONS_HEADER]) < 300
    assert len(encode_table(dict(headers))) <= 65_536 + 100


def test_a_round_sent_again_waits_from_its_first_arrival(spans: Recorded) -> None:
    queued = QueueSpans()
    with tracing.received(tracing.begin("round", {}).headers):
        queued.arrived(builders.verify("s", 0, 4))
        queued.arrived(builders.verify("s", 0, 4, attempt=1))
    batch = builders.batch("b1", builders.job("s", 0, 4))
    queued.sent(batch, "v1")
    queued.sent(batch, "v2")
    first, second = spans.ended
    assert first.end_time is not None
    assert second.start_time is not None
    assert second.start_time >= first.end_time - 10_000_000, "the second wait begins with the batch that was lost"
    assert first.parent == second.parent


def test_a_collector_that_does_not_answer_delays_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracing.configure("gateway", "g")
        span = tracing.begin("request", {})
        assert span
        span.end()
        tracing.close()
        assert tracing.CLOSING in [thread.name for thread in threading.enumerate()], "close() waited for the export"
    assert not tracing.is_on()
    span.child("after the end").end()
