"""A gateway's spans: of served, streamed, refused, failed and resumed requests, and none of probes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gateway_app import HELLO, MODEL, App, error_of
from gateway_peer import Script
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from otlp import Recorded, recording

from shared.messages import Failure
from shared.models.folder import ModelFolder

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def spans() -> Iterator[Recorded]:
    with recording() as recorded:
        yield recorded


def attributes(span: ReadableSpan) -> dict[str, Any]:
    assert span.attributes is not None
    return dict(span.attributes)


def request_span(spans: Recorded) -> ReadableSpan:
    """Return the span of the only request."""
    (found,) = [span for span in spans.ended if span.kind is SpanKind.SERVER]
    return found


@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat(app: App, spans: Recorded, stream: bool) -> None:
    options = {"stream": stream, "n": 2, "max_tokens": 50, "temperature": 0.5, "seed": 3}
    response = await app.http.post("/v1/chat/completions", json=HELLO | options, headers=TRACEPARENT)
    assert response.status_code == 200
    request = request_span(spans)
    assert request.name == "POST /v1/chat/completions"
    assert request.context.trace_id == int(TRACE, 16)
    assert request.status.status_code is StatusCode.UNSET
    tokens = 2 * len(app.script.text)
    expected = {
        "http.response.status_code": 200,
        "wisp.request_id": response.headers["x-request-id"],
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stream": stream,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.output_tokens": tokens,
    }
    assert {name: attributes(request).get(name) for name in expected} == expected
    below = [span for span in spans.ended if span.parent and span.parent.span_id == request.context.span_id]
    assert sorted(span.name for span in below) == ["admission", "completion", "completion"]
    completions = spans.named("completion")
    assert {attributes(span)["wisp.session"] for span in completions} == {one.session for one in app.generated}
    assert sum(attributes(span)["gen_ai.usage.output_tokens"] for span in completions) == tokens
    texts = [text for span in spans.ended for text in attributes(span).values() if isinstance(text, str)]
    assert not any("Hi" in text or app.script.text in text for text in texts)


async def test_a_refused_request(folder: ModelFolder, spans: Recorded) -> None:
    error_of(await App(folder, max_sessions=2).chat(n=3), 429)
    assert attributes(request_span(spans))["http.response.status_code"] == 429
    (admission,) = spans.named("admission")
    assert admission.status.status_code is StatusCode.ERROR
    assert spans.named("completion") == []


async def test_a_bad_request(app: App, spans: Recorded) -> None:
    error_of(await app.chat(max_tokens="many"), 400)
    (request,) = spans.ended
    assert (request.name, attributes(request)["http.response.status_code"]) == ("POST /v1/chat/completions", 400)
    assert request.status.status_code is StatusCode.UNSET, "the client's fault"


async def test_a_session_that_fails(app: App, spans: Recorded) -> None:
    app.script = Script(failure=Failure(code="session_gone", message="lost"))
    assert (await app.chat()).status_code >= 500
    request, (completion,) = request_span(spans), spans.named("completion")
    assert (request.status.status_code, completion.status.status_code) == (StatusCode.ERROR, StatusCode.ERROR)
    assert attributes(completion)["error.type"] == "session_gone"
    assert attributes(request)["gen_ai.response.finish_reasons"] == ("error",)


async def test_a_resumed_stream_has_a_link_to_the_first_request(app: App, spans: Recorded) -> None:
    body = HELLO | {"stream": True, "wisp": {"resumable": True}}
    first = (await app.http.post("/v1/chat/completions", json=body, headers=TRACEPARENT)).text
    last_id = [line for line in first.splitlines() if line.startswith("id: ")][1].removeprefix("id: ")
    rest = await app.http.get(f"/v1/streams/{last_id.split('/')[0]}", headers={"last-event-id": last_id})
    assert rest.status_code == 200
    before, after = [span for span in spans.ended if span.kind is SpanKind.SERVER]
    assert after.name == "GET /v1/streams/{answer_id}"
    assert after.context.trace_id != before.context.trace_id
    assert [link.context.span_id for link in after.links] == [before.context.span_id]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
async def test_probes_have_no_span(app: App, spans: Recorded, path: str) -> None:
    assert (await app.http.get(path)).status_code == 200
    assert spans.ended == []


async def test_an_unknown_path_has_no_route(app: App, spans: Recorded) -> None:
    error_of(await app.http.get("/v1/nothing?secret=1"), 404)
    (request,) = spans.ended
    assert (request.name, attributes(request)["url.path"]) == ("GET", "/v1/nothing")
    assert "http.route" not in attributes(request)
