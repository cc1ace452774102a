"""Errors that the product raises on purpose.

    WispError
    ├── SettingsError              a setting is missing or out of range (found at start)
    ├── BrokersError               RabbitMQ or Redis cannot be found, started or reached
    │   ├── Unroutable             no queue is bound to a message's routing key
    │   ├── QueueDown              a queue's RabbitMQ node does not run
    │   ├── AccessRefused          RabbitMQ refuses an exchange or a queue to this user
    │   └── EndedEarly             (services.tools.local) a private broker exited before it was ready
    ├── Fenced                     a verifier's lease has expired: nothing is committed
    ├── MessageError               bytes on a queue are no known message (dead-lettered)
    ├── ModelError                 a model folder is incomplete, or does not fit its partner
    │   └── ChatTemplateError      the messages cannot be rendered with the model's chat template
    ├── BadLogits                  the model computed no usable logits
    ├── NoTokenAllowed             a request's options leave no token to choose
    ├── GrammarError               a grammar cannot be built, or a session cannot follow it
    │   └── ParametersError        (services.gateway) no grammar can be built for the parameters of a tool
    ├── EngineError                the engine refuses a call; no session has changed
    │   ├── CacheFull              the KV budget cannot hold what the call needs
    │   ├── TooLong                more tokens than the model's context or the whole KV budget
    │   ├── NotAttached            the engine does not hold the session: attach it again
    │   └── BadStep                a step has a token outside the vocabulary, or asks for impossible rows
    ├── ApiError                   (services.gateway) ends an HTTP request with a status and an error body
    ├── KubernetesError            (services.drain_order) the Kubernetes API refuses a call or is unreachable
    ├── ServiceFailed              (services.tools.local) a service of a private stack failed to start
    ├── RecordingError             (services.tools.replayer) a recording cannot be read or written
    ├── ServerUnusable             (services.tools.bench) the measured server does not answer as needed
    └── ArmFailed                  (services.tools.bench) a compared program cannot be loaded, or its process has ended

Each message gives the problem, with the value, and the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SHOWN = 100
"""Most characters of a value in a message: a value can be a whole prompt."""


def quoted(value: object) -> str:
    """Return a value as messages show it: in quotes if it is a text, and cut to its first `SHOWN` characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else f"{value[:SHOWN]}…")
    return cut(repr(value), SHOWN)


_IN_WORDS = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be {le} or less",
    "less_than": "must be less than {lt}",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "missing": "is missing",
}
"""Sentences for people by pydantic's type of error, with the names of its context."""


def in_words(problem: ErrorDetails) -> str:
    """Return an item of pydantic's `ValidationError.errors()` in words for people, without place and given value."""
    if (words := _IN_WORDS.get(problem["type"])) is not None:
        limits = problem.get("ctx", {}).items()
        return words.format(
            **{name: int(limit) if isinstance(limit, float) and limit.is_integer() else limit for name, limit in limits}
        )
    return str(problem["msg"]).removeprefix("Value error, ")


def cut(text: str, most: int) -> str:
    """Return the first `most` characters of a text, with … where there are more."""
    return text if len(text) <= most else f"{text[:most]}…"


class WispError(Exception):
    """Base of every error raised on purpose."""


class SettingsError(WispError):
    """A setting is missing, malformed or out of range."""


class BrokersError(WispError):
    """RabbitMQ or Redis cannot be found, started or reached."""


class Unroutable(BrokersError):
    """No queue is bound to a message's routing key: its receiver is not running."""


class QueueDown(BrokersError):
    """A queue exists, but does not answer: the RabbitMQ node that holds it does not run."""


class AccessRefused(BrokersError):
    """RabbitMQ refuses an exchange or a queue to this user. Since version 4.3 it refuses a missing one too."""


class Fenced(WispError):
    """A verifier was frozen or cut off for longer than its lease, and its sessions have moved to others."""


class MessageError(WispError):
    """A message cannot be decoded; the receiver dead-letters it with this text as the reason."""


class ModelError(WispError):
    """A model folder cannot be used as it is."""


class ChatTemplateError(ModelError):
    """The messages cannot be rendered with the model's chat template, or the model has none.

    The caller's messages are at fault, not the model's files.
    """


class GrammarError(WispError):
    """A grammar cannot be built, or is too expensive at a position of a session."""


class BadLogits(WispError):
    """No token can be chosen from a row of logits. `row` is its index in the call."""

    def __init__(self, row: int, position: int, largest: float) -> None:
        super().__init__(
            f"the logits of row {row} (position {position}) have {largest} as their maximum: the model's weights are "
            "damaged, or overflow in this number format. Prepare the model again, or serve it in float32."
        )
        self.row = row


class NoTokenAllowed(WispError):
    """The options of a session leave no token to choose."""

    def __init__(self, position: int) -> None:
        super().__init__(
            f"the request's options allow no token at position {position}: allow more tokens (allowed_token_ids), or "
            "forbid fewer (bad_words, min_tokens)"
        )
        self.position = position


class EngineError(WispError):
    """The engine refuses a call; no session has changed."""


class CacheFull(EngineError):
    """The KV budget cannot hold what the call needs, even after evicting every idle session."""


class TooLong(EngineError):
    """A session would exceed the model's context or the whole KV budget."""


class NotAttached(EngineError):
    """The engine does not hold the session: it was never attached, or was evicted while idle."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"the engine does not hold session {session_id}; attach it with its committed tokens first")
        self.session_id = session_id


class BadStep(EngineError):
    """A step cannot be computed as requested."""
