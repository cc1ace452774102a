"""What of a device's messages goes to the scheduler: whatever it sends, others lose nothing by it. Pure.

A device is not trusted. Whose a message is follows from the queue that it came by. Of a round it may choose the draft,
and when it sends it; what it could gain by at others' cost is checked or corrected here:

    session, gateway, class, promise    sealed with the session's key (`shared.broker.seal`)
    drafter                             itself: nobody else gets the results that it asks for
    slack                               no less than what is known here: nobody is late by saying so
    hidden states asked for             as many as prompts and outputs need; what is over it is left out
    rounds                              so many a second; the others wait in the device's own queue, which is bounded
"""

from __future__ import annotations

from shared.broker.seal import Seal
from shared.broker.topology import device_name
from shared.messages import Message, Verify

LONGEST_DRAFT = 64
HIDDEN_ROWS = 20_000
"""Hidden states that a device may ask for at once: a few long prompts."""
HIDDEN_ROWS_PER_S = 1_000
BURST_S = 1.0


class Refused(Exception):
    """The message is not taken; the text says why."""


class Bucket:
    """Fills up at a rate, and holds so much at most."""

    def __init__(self, per_s: float, most: float) -> None:
        self._per_ms = per_s / 1000
        self._most = most
        self._level = most
        self._at_ms: float | None = None

    def take(self, amount: float, now_ms: float) -> bool:
        """Take it out, if that much is there."""
        if self._filled(now_ms) < amount:
            return False
        self._level -= amount
        return True

    def draw(self, amount: float, now_ms: float) -> float:
        """Take it out in any case; returns the time until it would have been there, in milliseconds."""
        self._level = self._filled(now_ms) - amount
        return max(0.0, -self._level / self._per_ms)

    def _filled(self, now_ms: float) -> float:
        passed = 0.0 if self._at_ms is None else max(0.0, now_ms - self._at_ms)
        self._level, self._at_ms = min(self._most, self._level + passed * self._per_ms), now_ms
        return self._level


class Gate:
    """What one device's messages pass."""

    def __init__(self, device: str, seal: Seal, rounds_per_s: float) -> None:
        self._drafter = device_name(device)
        self._seal = seal
        self._rounds = Bucket(rounds_per_s, max(1.0, rounds_per_s * BURST_S))
        self._hidden = Bucket(HIDDEN_ROWS_PER_S, HIDDEN_ROWS)

    def wait_ms(self, now_ms: float) -> float:
        """How long the next message has to wait; asked once for each, whatever it is."""
        return self._rounds.draw(1, now_ms)

    def check(self, message: Message, due_ms: float | None, now_ms: float) -> Verify:
        """The round as it may be taken. `due_ms`: when the session's next token is due, by what the scheduler has seen.

        Raises Refused.
        """
        if not isinstance(message, Verify):
            raise Refused(f"a {message.type_name} is no round")
        if message.drafter != self._drafter:
            raise Refused(f"the results would go to {message.drafter}")
        if not self._seal.fits(message):
            raise Refused("it does not show its session's key")
        if len(message.draft) > LONGEST_DRAFT:
            raise Refused(f"a draft of {len(message.draft)} tokens; {LONGEST_DRAFT} are the most")
        changed: dict[str, object] = {}
        slack_ms = None
        if message.tpot_ms is not None and message.slack_ms is not None:
            earliest = 0.0 if due_ms is None else due_ms - now_ms
            slack_ms = max(message.slack_ms, earliest)
        if slack_ms != message.slack_ms:
            changed["slack_ms"] = slack_ms
        if message.hidden_from is not None:
            asked = max(0, message.base_len - message.hidden_from) + len(message.draft) + 1
            if not self._hidden.take(asked, now_ms):
                changed["hidden_from"] = None
        return message.model_copy(update=changed) if changed else message
