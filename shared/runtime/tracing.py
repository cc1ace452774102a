"""Traces by OpenTelemetry: one trace per request, with spans of all services that work on it.

Tracing is on where OpenTelemetry's own variables name an exporter (`exporter_of`); they also set sampler, service name
and resource attributes. Off, every span is `NO_SPAN`, and OpenTelemetry's SDK is not imported.

A trace begins at a gateway. Its context travels in the headers of messages, never in their bodies: services of a
version without traces ignore it. A service continues the traces whose context it receives, and begins none. A request
that is not sampled has no context, so it costs the other services nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shared.errors import SettingsError, cut

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Link, Tracer
    from opentelemetry.trace import Span as OtelSpan

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
EXPORTERS = ("otlp", "console", "none")
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
SESSIONS_HEADER = "x-wisp-traces"
"""Header of a batch: the trace context of each session with a trace."""
MOST_BYTES = 65_536
"""Longest header of a batch: all headers of a message have to fit into one AMQP frame, of 128 KiB by default."""
TABLE_BYTES = 32
"""Bytes of a session's entry in a header, beside its strings."""
MOST_OF_REASON = 200
"""Most characters of an error of OpenTelemetry's."""
CLOSE_S = 3.0
"""Longest time at the end to export the last spans."""
CLOSING = "last spans"
"""Name of the thread that exports them."""

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]
Headers = Mapping[str, Any]


class Span:
    """A span, or the context of another process's span, which records nothing itself. True unless it is `NO_SPAN`."""

    __slots__ = ("_span",)

    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    def __bool__(self) -> bool:
        return True

    def child(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        start_ns: int | None = None,
        links: Sequence[Span] = (),
        kind: str = "INTERNAL",
    ) -> Span:
        """Start a span below this one; `NO_SPAN` if the sampler drops it.

        start_ns: in nanoseconds since 1970; default: now. kind: a name in OpenTelemetry's `SpanKind`.
        """
        return _start(name, self._span, attributes, start_ns, links, kind)

    def set(self, attributes: Attributes) -> None:
        """Set attributes."""
        self._span.set_attributes(attributes)

    def event(self, name: str, at_ns: int | None = None) -> None:
        """Add an event. at_ns: in nanoseconds since 1970; default: now."""
        self._span.add_event(name, timestamp=at_ns)

    def link(self, headers: Headers) -> None:
        """Add a link to the span that these headers name."""
        if (linked := _remote(headers)) is not None:
            self._span.add_link(linked.get_span_context())

    def rename(self, name: str) -> None:
        """Change the span's name."""
        self._span.update_name(name)

    def fail(self, error_type: str) -> None:
        """Mark the span's work as failed. error_type: a name of few values, without users' text."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", error_type)
        self._span.set_status(StatusCode.ERROR)

    def end(self, attributes: Attributes | None = None, at_ns: int | None = None) -> None:
        """End the span, with these further attributes. at_ns: in nanoseconds since 1970; default: now."""
        if attributes:
            self._span.set_attributes(attributes)
        self._span.end(at_ns)

    @property
    def headers(self) -> Headers:
        """Headers of a message that belongs to this span; empty for `NO_SPAN`."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        _propagator().inject(carrier, set_span_in_context(self._span))
        return carrier

    @property
    def ids(self) -> dict[str, str]:
        """Fields of a log line within this span; empty for `NO_SPAN`."""
        context = self._span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def _link(self) -> Link | None:
        from opentelemetry.trace import Link

        return Link(self._span.get_span_context())


class _NoSpan(Span):
    """The span of work that is not traced: its methods do nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __bool__(self) -> bool:
        return False

    def child(self, name: str, attributes: Attributes | None = None, **_: object) -> Span:
        return self

    def set(self, attributes: Attributes) -> None:
        pass

    def event(self, name: str, at_ns: int | None = None) -> None:
        pass

    def link(self, headers: Headers) -> None:
        pass

    def rename(self, name: str) -> None:
        pass

    def fail(self, error_type: str) -> None:
        pass

    def end(self, attributes: Attributes | None = None, at_ns: int | None = None) -> None:
        pass

    @property
    def headers(self) -> Headers:
        return _NO_HEADERS

    @property
    def ids(self) -> dict[str, str]:
        return {}

    def _link(self) -> Link | None:
        return None


_NO_HEADERS: Headers = {}
NO_SPAN: Span = _NoSpan()
"""The only `_NoSpan`."""

_tracer: Tracer | None = None
_provider: TracerProvider | None = None
_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)
_sessions: ContextVar[Headers] = ContextVar("traces of sessions", default=_NO_HEADERS)


def exporter_of(environment: Mapping[str, str]) -> str | None:
    """Return the exporter that an environment asks for, `otlp` or `console`; None if tracing is off.

    OTEL_TRACES_EXPORTER names it. Without that variable, an OTLP endpoint asks for `otlp`. Raises SettingsError.
    """

    def value(name: str) -> str:
        return environment.get(name, "").strip()

    endpoint_variable = next((name for name in ENDPOINTS if value(name)), None)
    exporter = value("OTEL_TRACES_EXPORTER").lower() or ("otlp" if endpoint_variable else "none")
    if exporter not in EXPORTERS:
        raise SettingsError(
            f"OTEL_TRACES_EXPORTER is {exporter[:60]!r}; spans can be exported to {', '.join(EXPORTERS)}"
        )
    if exporter == "none" or value("OTEL_SDK_DISABLED").lower() == "true":
        return None
    if exporter == "otlp":
        protocol_variable = next((name for name in PROTOCOLS if value(name)), None)
        if protocol_variable and value(protocol_variable) != PROTOCOL:
            raise SettingsError(
                f"{protocol_variable} is {value(protocol_variable)[:60]!r}; spans are exported as {PROTOCOL} only, "
                "for which collectors have port 4318"
            )
        if endpoint_variable and not _is_http(value(endpoint_variable)):
            raise SettingsError(f"{endpoint_variable} is no HTTP URL; expected the form http://collector:4318")
    return exporter


def _is_http(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def configure(service: str, instance: str, namespace: str = "", environment: Mapping[str, str] = os.environ) -> None:
    """Switch tracing on for this process if its environment asks for it. Raises SettingsError."""
    exporter = exporter_of(environment)
    if exporter is None:
        return
    try:
        provider = _make_provider(exporter, service, instance, namespace)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"the environment asks for traces (OTEL_...), but the package of {error.name} is missing; install "
            "wisp[otel], or set OTEL_TRACES_EXPORTER=none"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise SettingsError(
            f"OpenTelemetry refuses one of its variables (OTEL_...): {cut(str(error), MOST_OF_REASON)}"
        ) from error
    # OpenTelemetry logs every malformed header of a client, with its text.
    logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
    use(provider)


def _make_provider(exporter: str, service: str, instance: str, namespace: str) -> TracerProvider:
    """Return a provider with this exporter, set up by OpenTelemetry's variables."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    exports: SpanExporter
    if exporter == "console":
        exports = ConsoleSpanExporter()
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exports = OTLPSpanExporter()
    own = {
        "service.name": f"wisp-{service}",
        "service.namespace": namespace,
        "service.instance.id": instance,
        "service.version": version("wisp"),
        "wisp.service": service,
    }
    given = OTELResourceDetector().detect().attributes
    resource = Resource.create().merge(Resource({**{name: text for name, text in own.items() if text}, **given}))
    # Not the global provider: libraries would add spans of their own, with addresses and users' text.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exports))
    return provider


def use(provider: TracerProvider | None) -> None:
    """Record spans with this provider from now on; None switches tracing off."""
    global _provider, _tracer
    _provider = provider
    _tracer = None if provider is None else provider.get_tracer("wisp", version("wisp"))


def close() -> None:
    """Export the last spans, for `CLOSE_S` at most: a collector that does not answer delays no service's end."""
    if (provider := _provider) is None:
        return
    use(None)
    closing = Thread(target=provider.shutdown, name=CLOSING, daemon=True)
    closing.start()
    closing.join(CLOSE_S)


def is_on() -> bool:
    """Return whether this process records spans."""
    return _tracer is not None


def begin(name: str, headers: Mapping[str, str], attributes: Attributes | None = None) -> Span:
    """Start the first span of a request here, below the client's span if its `traceparent` header names one."""
    if _tracer is None:
        return NO_SPAN
    return _start(name, _remote(headers), attributes, None, (), "SERVER")


def current() -> Span:
    """Return the span of the work at hand, here or in the service that has sent the message being handled."""
    return _current.get()


@contextmanager
def active(span: Span) -> Iterator[None]:
    """Make a span the current one for the length of the context."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


def names_span(headers: Headers) -> bool:
    """Return whether a message has the headers for `received`."""
    return TRACEPARENT in headers or SESSIONS_HEADER in headers


@contextmanager
def received(headers: Headers) -> Iterator[None]:
    """Make the span that a message's headers name the current one for the length of the context."""
    span = None if _tracer is None else _remote(headers)
    traces = headers.get(SESSIONS_HEADER)
    token = _sessions.set(traces if isinstance(traces, Mapping) else _NO_HEADERS)
    try:
        with active(NO_SPAN if span is None else Span(span)):
            yield
    finally:
        _sessions.reset(token)


def headers_of(spans: Mapping[str, Span]) -> Headers:
    """Return the headers of a message about several sessions, given the span of each session with a trace.

    Contexts beyond `MOST_BYTES` are left out: their sessions are not traced in the receiver.
    """
    traces = {}
    left = MOST_BYTES
    for session_id, span in spans.items():
        headers = dict(span.headers)
        left -= len(session_id) + sum(len(name) + len(text) for name, text in headers.items()) + TABLE_BYTES
        if left < 0:
            break
        traces[session_id] = headers
    return {SESSIONS_HEADER: traces} if traces else {}


def session_spans() -> dict[str, Span]:
    """Return the spans of the sessions that the message being handled is about."""
    found: dict[str, Span] = {}
    if _tracer is None:
        return found
    for session_id, headers in _sessions.get().items():
        if isinstance(headers, Mapping) and (span := _remote(headers)) is not None:
            found[session_id] = Span(span)
    return found


def _start(
    name: str,
    parent: OtelSpan | None,
    attributes: Attributes | None,
    start_ns: int | None,
    links: Sequence[Span],
    kind: str,
) -> Span:
    if _tracer is None:  # closed since
        return NO_SPAN
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind, set_span_in_context

    context = Context() if parent is None else set_span_in_context(parent, Context())
    linked = [link for link in (one._link() for one in links) if link is not None]
    span = _tracer.start_span(name, context, SpanKind[kind], attributes, linked, start_ns)
    return Span(span) if span.is_recording() else NO_SPAN


def _remote(headers: Headers) -> OtelSpan | None:
    """Return the span that headers name; None if there is none, or its trace is not valid.

    In messages headers may have any type, and OpenTelemetry raises TypeError for those that are no strings.
    """
    context = {name: text for name in (TRACEPARENT, TRACESTATE) if isinstance(text := headers.get(name), str)}
    if TRACEPARENT not in context:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import get_current_span

    span = get_current_span(_propagator().extract(context, Context()))
    return span if span.get_span_context().is_valid else None


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()
