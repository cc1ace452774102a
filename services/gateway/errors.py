"""Errors of the HTTP API: a status and OpenAI's error body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import WispError, cut
from shared.messages import Failure

REFUSED_HEADER = "x-wisp-refused"
DROPPED_HEADER = "x-llm-d-request-dropped-reason"
"""llm-d's header; `DROPPED` is its value for a request refused for lack of capacity."""
DROPPED = "rejected-saturated"
RATE_LIMITED = "rate_limit_exceeded"
"""Code of refusals caused by a key's own limits, not by the load."""

_TYPES = {429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}

MESSAGES_PATH = "/v1/messages"
"""Path of Anthropic's API."""
_MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_STATUS_OF_FAILURE = {
    "arithmetic_unavailable": 503,
    "context_length_exceeded": 400,
    "cancelled": 503,
    "no_token_allowed": 400,
    "grammar_failed": 400,
    "queue_timeout": 503,
    "session_gone": 503,
    "shutting_down": 503,
    "timeout": 504,
    "wrong_model": 503,
}
"""HTTP status by the code of a session's failure; 500 for other codes."""
MOST_CHARACTERS = 1000
"""Longest message: errors of templates and grammars may contain a whole prompt. Options' values are cut by `quoted`."""
MOST_OF_NAME = 200
"""Longest name of an option: clients may send any."""
_RETRY_AFTER_S = {"queue_timeout": 10}
"""Seconds after which to try again, by the code of a failure with status 503; 1 for other codes."""
_STREAM_GONE = (
    "there is no such stream to resume: it is unknown, ended long ago, was not streamed, or its state was lost; "
    "send the request again"
)


class ApiError(WispError):
    """End a request with this HTTP status and error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        kind: str | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """`kind` is the body's `type`, by default the one of the status; `extra` are further headers."""
        self.message = cut(message, MOST_CHARACTERS)
        super().__init__(self.message)
        self.status = status
        self.code = code
        self.param = None if param is None else cut(param, MOST_OF_NAME)
        self.retry_after_s = retry_after_s
        self.kind = kind
        self.extra = dict(extra or {})

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error body."""
        kind = (
            self.kind or _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body_at(self, path: str) -> dict[str, Any]:
        """Return the error body of the API that has this path: Anthropic's or OpenAI's."""
        if not path.startswith(MESSAGES_PATH):
            return self.body()
        kind = _MESSAGES_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the error."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 429 and self.code:
            headers[REFUSED_HEADER] = self.code
            if self.code != RATE_LIMITED:
                headers[DROPPED_HEADER] = DROPPED
        return headers | self.extra


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """Return the error of a wrong request; sending it again unchanged does not help."""
    return ApiError(400, message, code=code, param=param)


def unavailable(message: str, code: str = "unavailable", retry_after_s: int = 1) -> ApiError:
    """Return the error of a valid request that needs a service that is away for now."""
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)


def stream_gone(detail: str = "") -> ApiError:
    """Return the error of a stream that cannot be resumed."""
    return ApiError(404, f"{_STREAM_GONE} ({detail})" if detail else _STREAM_GONE, code="stream_gone")


def internal_error() -> ApiError:
    """Return the error of a defect. Its cause is in the log only."""
    return ApiError(500, "internal error; its cause is in the log under this request's id")


def from_failure(failure: Failure) -> ApiError:
    """Return the error of a session that failed."""
    status = _STATUS_OF_FAILURE.get(failure.code, 500)
    return ApiError(
        status,
        failure.message,
        code=failure.code,
        retry_after_s=_RETRY_AFTER_S.get(failure.code, 1) if status == 503 else None,
    )
