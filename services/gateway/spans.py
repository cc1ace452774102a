"""Spans of a gateway: of a request, its admission and its completions.

Their attributes follow OpenTelemetry's conventions for HTTP servers and generative AI. None contains a prompt or a
completion.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager

from starlette.datastructures import Headers
from starlette.types import Scope

from services.gateway.answer import Answer, RunningSession
from services.gateway.errors import ApiError
from shared.messages import Generate
from shared.runtime import tracing
from shared.runtime.tracing import Span, Value

LONGEST_TEXT = 200
"""Most characters of a text that a client chooses."""


def begin_request(scope: Scope, request_id: str) -> Span:
    """Start the span of an HTTP request, below the client's own span if its headers name one."""
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
    if (route := getattr(scope.get("route"), "path", None)) is not None:
        span.rename(f"{scope['method']} {route}")
        span.set({"http.route": route})
    if status:
        span.set({"http.response.status_code": status})
    if status >= 500:
        span.fail(str(status))
    span.end()


@asynccontextmanager
async def traced(answer: Answer, serving: AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
    """Serve an answer during the context, and trace its admission and its outcome."""
    request = tracing.current()
    try:
        async with AsyncExitStack() as stack:
            if answer.resumed:
                _link(request, answer)
                await stack.enter_async_context(serving)
            else:
                with _admission(request, answer):
                    await stack.enter_async_context(serving)
            yield
    finally:
        _conclude(request, answer)


@contextmanager
def _admission(request: Span, answer: Answer) -> Iterator[None]:
    """Trace the admission of an answer: the decision, and the start of its sessions."""
    request.set(_request_attributes(answer, answer.sessions[0]))
    span = request.child("admission", {"wisp.service_class": answer.form.service_class, "wisp.pool": answer.form.pool})
    try:
        yield
    except ApiError as error:
        span.fail(error.code or str(error.status))
        raise
    finally:
        span.end()


def _link(request: Span, answer: Answer) -> None:
    """Link the request's span to the request whose stream it resumes."""
    if answer.form.traceparent:
        request.set({"wisp.resumed": True})
        request.link({tracing.TRACEPARENT: answer.form.traceparent})


def end_completion(session: RunningSession, reason: str) -> None:
    """End the span of a completion. reason: as in the gateway's metrics."""
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


def _conclude(request: Span, answer: Answer) -> None:
    """Add the outcome of an answer to the request's span."""
    if not answer.running:
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
    request.set(attributes)


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
