"""A recording: the messages of a suite in the order in which the broker had them. Pure.

Bodies stay packed until they are looked at: a hundred thousand messages are some tens of megabytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.errors import MessageError, WispError
from shared.messages import Message, decode


class RecordingError(WispError):
    """A recording cannot be read, or does not hold what is asked of it."""


@dataclass(frozen=True)
class Source:
    """Where messages were recorded."""

    namespace: str
    vhost: str = ""
    address: str = ""
    """Host and port of the broker, as the reader reached it."""
    cluster: str = ""
    """The broker's own name for itself."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A message as it was recorded."""

    at_us: int | None
    """When it was sent: microseconds since 1970 on its sender's clock; None from a sender that does not say."""
    key: str
    """Its routing key."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A recorded message, unpacked."""

    at_ms: float | None
    """When it was sent: milliseconds since 1970 on its sender's clock; None from a sender that does not say."""
    key: str
    message: Message


@dataclass
class Recording:
    """Messages, and what is known of them as a whole."""

    source: Source
    packed: list[Packed] = field(default_factory=list)
    redacted: bool = False
    """Token ids were replaced by zeros."""
    notes: list[str] = field(default_factory=list)
    """What the reader of the recording should know, in words."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Messages that are none of ours, or of a version that is not understood, by reason."""

    def entries(self) -> Iterator[Entry]:
        """The messages that are understood, in the order of the broker; counts the others in `skipped`."""
        self.skipped.clear()
        for one in self.packed:
            try:
                message = decode(one.body)
            except MessageError as error:
                self.skipped[str(error)] += 1
                continue
            yield Entry(None if one.at_us is None else one.at_us / 1000, one.key, message)

    def within(self, since_ms: float | None, until_ms: float | None) -> Recording:
        """What was sent in a span of time (milliseconds since 1970); messages without a time are left out then."""
        if since_ms is None and until_ms is None:
            return self
        low = -1.0 if since_ms is None else since_ms * 1000
        high = float("inf") if until_ms is None else until_ms * 1000
        kept = [one for one in self.packed if one.at_us is not None and low <= one.at_us <= high]
        return Recording(self.source, kept, self.redacted, self.notes)

    def refuse_redacted(self, purpose: str) -> None:
        """Raises RecordingError where the tokens were removed."""
        if self.redacted:
            raise RecordingError(
                f"this recording was exported without text and tokens, so it cannot be used to {purpose}; only lengths "
                "and times are left in it"
            )
