"""Spans of a gateway: of a request, its admission and its completions.

Their attributes follow OpenTelemetry's conventions for HTTP servers and generative AI. None contains a prompt or a
completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Scope

from services.gateway.answer import Answer, RunningSession
from services.gateway.errors import ApiError
from shared.messages import Generate
from shared.runtime import tracing
from shared.runtime.tracing import NO_SPAN, Span, Value

LONGEST_TEXT = 200
"""Most characters of a text that a client chooses."""


def begin_request(scope: Scope, request_id: str) -> Span:
    """Start the span of an HTTP request, below the client's own span if its headers name one."""
    if not tracing.is_on():
        return NO_SPAN
    headers = Headers(scope=scope)
    attributes: dict[str, Value] = {
        "http.request.method": scope["method"],
        "url.path": scope["path"][:LONGEST_TEXT],
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        "wisp.request_id": request_id,
    }
    for name, address in (("server", scope.get("server")), ("client", scope.get("client"))):
        if address is not None:
            attributes[f"{name}.address"] = address[0]
            if address[1] is not None:
                attributes[f"{name}.port"] = address[1]
    if agent := headers.get("user-agent"):
        attributes["user_agent.original"] = agent[:LONGEST_TEXT]
    return tracing.begin(scope["method"], headers, attributes)


def end_request(span: Span, scope: Scope, status: int) -> None:
    """End the span of a request. status: 0 if no answer was sent."""
    if not span:
        return
    if (route := getattr(scope.get("route"), "path", None)) is not None:
        span.rename(f"{scope['method']} {route}")
        span.set({"http.route": route})
    if status:
        span.set({"http.response.status_code": status})
    if status >= 500:
        span.fail(str(status))
    span.end()


@contextmanager
def admission(answer: Answer) -> Iterator[None]:
    """Trace the admission of an answer: the decision, and the start of its sessions."""
    request = tracing.current()
    if not request:
        yield
        return
    request.set(_request_attributes(answer, answer.sessions[0]))
    span = request.child("admission", {"wisp.service_class": answer.form.service_class, "wisp.pool": answer.form.pool})
    try:
        yield
    except ApiError as error:
        span.fail(error.code or str(error.status))
        raise
    finally:
        span.end()


def resumed(answer: Answer) -> None:
    """Link the request's span to the request whose stream it resumes."""
    if (span := tracing.current()) and answer.form.traceparent:
        span.set({"wisp.resumed": True})
        span.link({tracing.TRACEPARENT: answer.form.traceparent})


def begin_completion(generate: Generate) -> Span:
    """Start the span of a completion: of its session while this gateway serves it."""
    request = tracing.current()
    if not request:
        return NO_SPAN
    attributes: dict[str, Value] = {"wisp.session": generate.session, "gen_ai.usage.input_tokens": len(generate.prompt)}
    return request.child("completion", attributes)


def end_completion(session: RunningSession, reason: str) -> None:
    """End the span of a completion. reason: as in the gateway's metrics."""
    if not session.span:
        return
    tally, failure = session.completion.tally, session.completion.failure
    if failure is not None:
        session.span.fail(failure.code)
    session.span.end(
        {
            "gen_ai.response.finish_reasons": [reason],
            "gen_ai.usage.output_tokens": tally.tokens,
            "wisp.rounds": tally.rounds,
            "wisp.verified": tally.verified,
            "wisp.accepted": tally.accepted,
            "wisp.run_tokens": tally.run_tokens,
        }
    )


def conclude(answer: Answer) -> None:
    """Add the outcome of an answer to the request's span."""
    span = tracing.current()
    if not span or not answer.running:
        return
    usage = answer.usage
    reasons = [str(session.completion.finish or session.end_reason) for session in answer.running]
    attributes: dict[str, Value] = {
        "gen_ai.response.id": answer.answer_id,
        "gen_ai.response.model": answer.form.model,
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }
    if answer.ttft_ms:
        attributes["gen_ai.response.time_to_first_chunk"] = answer.ttft_ms / 1000
    outcomes = [session.outcome for session in answer.running if session.outcome is not None]
    if outcomes and answer.running[0].generate.slo is not None:
        attributes["wisp.slo_attained"] = all(outcome.attained for outcome in outcomes)
    span.set(attributes)


def _request_attributes(answer: Answer, generate: Generate) -> dict[str, Value]:
    sampling = generate.sampling
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": "chat" if answer.form.chat else "text_completion",
        "gen_ai.provider.name": "wisp",
        "gen_ai.request.model": answer.form.model,
        "gen_ai.request.max_tokens": generate.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": answer.form.seed,
        "gen_ai.request.stream": answer.stream,
        "gen_ai.request.choice.count": answer.form.copies,
        "wisp.service_class": answer.form.service_class,
        "wisp.draft": generate.draft,
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.rules is not None:
        attributes["gen_ai.request.presence_penalty"] = sampling.rules.presence_penalty
        attributes["gen_ai.request.frequency_penalty"] = sampling.rules.frequency_penalty
    return attributes
