"""Every error that the product raises on purpose.

    WispError
    ├── SettingsError      a setting is missing or out of range (found at start)
    ├── BrokersError       RabbitMQ or Redis is not there, or could not be started
    │   └── Unroutable     no queue takes this message
    ├── Fenced             a verifier's lease has ended: what it was given under it is not committed
    ├── MessageError       bytes on a queue are not a message we know (dead-lettered)
    ├── ModelError         a model folder is incomplete, or does not fit its partner
    │   └── ChatTemplateError  (shared.models) the messages cannot be rendered
    ├── BadLogits          (shared.sampling.sampler) the model computed no usable logits
    └── EngineError        the engine refuses work; nothing has changed
        ├── CacheFull      the K/V budget cannot hold what this call needs
        ├── TooLong        more tokens than the model's context or the whole budget
        ├── NotAttached    the session is unknown to the engine, or was evicted: attach it again
        └── BadStep        a step names a token that the vocabulary lacks, or asks for impossible rows

The text of each says what was wrong, with the value, and what to do.
"""

from __future__ import annotations


class WispError(Exception):
    """Base of every error raised on purpose."""


class SettingsError(WispError):
    """A setting is missing, malformed or out of range."""


class BrokersError(WispError):
    """RabbitMQ or Redis cannot be found, started or reached."""


class Unroutable(BrokersError):
    """No queue is bound for a message's routing key: its receiver is not running."""


class Fenced(WispError):
    """A verifier was frozen or cut off for longer than its lease, and its sessions are with others by now."""


class MessageError(WispError):
    """A message cannot be decoded; the receiver dead-letters it with this text as the reason."""


class ModelError(WispError):
    """A model folder cannot be used as it is."""


class EngineError(WispError):
    """The engine refuses a call; no session has changed."""


class CacheFull(EngineError):
    """The K/V budget cannot hold what this call needs, even after evicting every idle session."""


class TooLong(EngineError):
    """A session would exceed the model's context or the whole K/V budget."""


class NotAttached(EngineError):
    """The engine does not know the session: it was never attached, or it was evicted while idle."""

    def __init__(self, session: str) -> None:
        super().__init__(f"the engine holds nothing of session {session}; attach it with its committed tokens first")
        self.session = session


class BadStep(EngineError):
    """A step cannot be computed as asked."""
