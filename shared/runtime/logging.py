"""Structured logs: one line per event on standard error, with service and instance bound once.

`session` and `round` are bound where a message is handled (`structlog.contextvars.bound_contextvars`). With tracing on,
`trace_id` and `span_id` are those of the span of the work at hand.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time

import structlog
from structlog.processors import TimeStamper

from shared.runtime import tracing

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Without local variables, which would put passwords and users' text into the logs.
_TRACEBACKS = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


def configure(service: str, instance: str, level: str, log_format: str) -> None:
    """Configure structlog, and the standard library's logging of our dependencies, for this process.

    log_format: "json"; "console" for people, with the time of day, in colour if a terminal shows it; "auto" for console
    in a terminal, else JSON. Call it after `tracing.configure`.
    """
    in_terminal = sys.stderr.isatty()
    for_people = log_format == "console" or (log_format == "auto" and in_terminal)
    clock = TimeStamper(fmt="%H:%M:%S", utc=False) if for_people else TimeStamper(fmt="iso", utc=True)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        clock,
        structlog.processors.StackInfoRenderer(),
    ]
    if tracing.is_on():
        shared.insert(1, _add_trace)
    if level == "debug":
        shared.append(_add_monotonic)
    renderer: list[structlog.typing.Processor] = (
        [
            _escape_controls,
            structlog.dev.ConsoleRenderer(
                colors=in_terminal and not os.environ.get("NO_COLOR"),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
        if for_people
        else [structlog.processors.ExceptionRenderer(_TRACEBACKS), structlog.processors.JSONRenderer()]
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Below warnings, our dependencies log only reconnects and access lines.
    root.setLevel(max(number, logging.WARNING))
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service, instance=instance)


def _add_trace(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add the ids of the current span, by which a log line is found from its trace."""
    event.update(tracing.current().ids)
    return event


def _add_monotonic(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add a clock that all processes of a machine share, so that debug logs of a round can be compared."""
    event["monotonic_ms"] = round(time.monotonic() * 1000, 3)
    return event


def _escape_controls(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape control characters in texts of other programs, with which they could take over a terminal. JSON does."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
    return event


def get() -> structlog.typing.FilteringBoundLogger:
    """Return the process's logger."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
