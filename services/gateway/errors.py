"""What a client is told when its request cannot be served: OpenAI's error body, for every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import WispError
from shared.messages import Failure

REFUSED_HEADER = "x-wisp-refused"
DROPPED_HEADER = "x-llm-d-request-dropped-reason"
"""llm-d's; its value for a request that was refused for want of capacity is `DROPPED`."""
DROPPED = "rejected-saturated"
RATE_LIMITED = "rate_limit_exceeded"
"""The code of refusals that a key's own limits cause, and not the load."""

_TYPES = {429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}

_STATUS_OF_FAILURE = {
    "context_length_exceeded": 400,
    "cancelled": 503,
    "session_gone": 503,
    "shutting_down": 503,
    "timeout": 504,
    "wrong_model": 503,
}
"""HTTP status of a session's failure; 500 for the codes that are not here."""


class ApiError(WispError):
    """Ends a request with this HTTP status and error body."""

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
        """kind: the body's `type`, where it is not what the status says. extra: further headers."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.kind = kind
        self.extra = dict(extra or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = (
            self.kind or _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the error."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 429 and self.code:
            headers[REFUSED_HEADER] = self.code
            if self.code != RATE_LIMITED:
                headers[DROPPED_HEADER] = DROPPED
        return headers | self.extra


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """The request is wrong; sending it again unchanged is no use."""
    return ApiError(400, message, code=code, param=param)


def unavailable(message: str, code: str = "unavailable", retry_after_s: int = 1) -> ApiError:
    """The request is fine, but a part that it needs is away for now."""
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)


def internal_error() -> ApiError:
    """A defect of ours; what it was is for the log only."""
    return ApiError(500, "internal error; the log has it under this request's id")


def from_failure(failure: Failure) -> ApiError:
    """The HTTP answer to a session that a verifier or drafter gave up."""
    status = _STATUS_OF_FAILURE.get(failure.code, 500)
    return ApiError(status, failure.message, code=failure.code, retry_after_s=1 if status == 503 else None)
