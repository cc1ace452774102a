"""Spans in tests: recorded in this process, or received over HTTP as a collector does."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

from shared.runtime import tracing


@dataclass(frozen=True)
class SeenSpan:
    """A span as the receiver got it."""

    name: str
    service: str
    """The service of the process that made it."""
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for the first span of a trace."""
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[str]
    links: list[tuple[str, str]]
    """Trace and span of each."""
    failed: bool


@dataclass
class Receiver:
    """The received spans."""

    url: str
    spans: list[SeenSpan] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def of(self, trace_id: str) -> list[SeenSpan]:
        """Return the spans of a trace."""
        return [span for span in tuple(self.spans) if span.trace_id == trace_id]

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            resource = _fields(group.resource.attributes)
            for span in (span for scope in group.scope_spans for span in scope.spans):
                self.spans.append(
                    SeenSpan(
                        span.name,
                        resource["wisp.service"],
                        resource["service.instance.id"],
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.kind,
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        _fields(span.attributes),
                        resource,
                        [event.name for event in span.events],
                        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                        span.status.code == span.status.STATUS_CODE_ERROR,
                    )
                )


class Recorded:
    """The spans that this process has made."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def ended(self) -> list[ReadableSpan]:
        """The ended spans, in the order of their ends."""
        return list(self._exporter.get_finished_spans())

    def named(self, *names: str) -> list[ReadableSpan]:
        return [span for span in self.ended if span.name in names]


@contextmanager
def recording(sampler: Sampler | None = None) -> Iterator[Recorded]:
    """Switch tracing on in this process during the context."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    try:
        yield Recorded(exporter)
    finally:
        tracing.use(None)


def _fields(pairs: Any) -> dict[str, Any]:
    def value(one: AnyValue) -> Any:
        kind = one.WhichOneof("value")
        return [value(each) for each in one.array_value.values] if kind == "array_value" else getattr(one, kind)

    return {pair.key: value(pair.value) for pair in pairs}


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Receive spans at a free port of this machine during the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.paths.add(self.path)
            receiver.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
