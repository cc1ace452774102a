"""A recording: a suite's messages in the order in which the broker stored them.

Bodies stay packed until they are read, so that 100,000 messages take some tens of megabytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.errors import MessageError, WispError
from shared.messages import Message, decode


class RecordingError(WispError):
    """A recording cannot be read, or lacks what a command needs."""


@dataclass(frozen=True)
class RecordingSource:
    """The broker and namespace from which a recording comes."""

    namespace: str
    vhost: str = ""
    address: str = ""
    """Host and port under which the reader reached the broker."""
    cluster: str = ""
    """The name that the broker gives itself."""


@dataclass(frozen=True, slots=True)
class PackedMessage:
    """A recorded message as it was sent."""

    at_us: int | None
    """Send time in microseconds since 1970 by the sender's clock; None if the sender gave none."""
    key: str
    """Routing key."""
    body: bytes


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A recorded message, decoded."""

    at_ms: float | None
    """Send time in milliseconds since 1970 by the sender's clock; None if the sender gave none."""
    key: str
    message: Message


@dataclass
class Recording:
    """Recorded messages with their source and state."""

    source: RecordingSource
    packed: list[PackedMessage] = field(default_factory=list)
    redacted: bool = False
    """True if token ids were replaced by zeros."""
    notes: list[str] = field(default_factory=list)
    """Warnings for the user."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Messages that `entries` could not decode, by reason."""

    def entries(self) -> Iterator[JournalEntry]:
        """Decode the messages in the broker's order; count those that cannot be decoded in `skipped`."""
        self.skipped.clear()
        for packed in self.packed:
            try:
                message = decode(packed.body)
            except MessageError as error:
                self.skipped[str(error)] += 1
                continue
            yield JournalEntry(None if packed.at_us is None else packed.at_us / 1000, packed.key, message)

    def within(self, since_ms: float | None, until_ms: float | None) -> Recording:
        """Return the messages sent in a span of time (milliseconds since 1970), without those that have no time."""
        if since_ms is None and until_ms is None:
            return self
        low = -1.0 if since_ms is None else since_ms * 1000
        high = float("inf") if until_ms is None else until_ms * 1000
        kept = [packed for packed in self.packed if packed.at_us is not None and low <= packed.at_us <= high]
        return Recording(self.source, kept, self.redacted, self.notes)

    def refuse_redacted(self, purpose: str) -> None:
        """Raise RecordingError if the tokens were removed."""
        if self.redacted:
            raise RecordingError(
                f"this recording was exported without text and tokens, so it cannot be used to {purpose}; it holds "
                "only lengths and times"
            )
