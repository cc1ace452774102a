"""Checks on the rounds of one remote device, so that nothing a device sends harms other sessions.

A device is not trusted. Its queue identifies the sender. The device chooses its draft and when to send it. Everything
by which it could gain at the expense of others is checked or corrected here:

    session, gateway, class, SLO   covered by the session key (`shared.broker.session_keys`)
    drafter                        the device itself, so that no other drafter gets the results that it asks for
    slack                          at least what the scheduler predicts, so that no device claims to be late
    hidden states                  as many rows as prompts and outputs need; a request for more is dropped
    rate of rounds                 limited; further rounds wait in the device's own queue, which is bounded
"""

from __future__ import annotations

from shared.broker.session_keys import SessionKeys
from shared.broker.topology import device_name
from shared.messages import Message, Verify

LONGEST_DRAFT = 64
HIDDEN_ROWS = 20_000
"""Rows of hidden states that a device may ask for at once: a few long prompts."""
HIDDEN_ROWS_PER_S = 1_000
BURST_S = 1.0


class RoundRefused(Exception):
    """The message is refused; the text gives the reason."""


class RateBucket:
    """A token bucket: it fills at a constant rate up to a limit."""

    def __init__(self, per_s: float, most: float) -> None:
        self._per_ms = per_s / 1000
        self._most = most
        self._level = most
        self._at_ms: float | None = None

    def take(self, amount: float, now_ms: float) -> bool:
        """Take this amount if the bucket holds it; return whether it did."""
        if self._filled(now_ms) < amount:
            return False
        self._level -= amount
        return True

    def draw(self, amount: float, now_ms: float) -> float:
        """Take this amount in any case; return the milliseconds until the level is back at zero."""
        self._level = self._filled(now_ms) - amount
        return max(0.0, -self._level / self._per_ms)

    def _filled(self, now_ms: float) -> float:
        passed = 0.0 if self._at_ms is None else max(0.0, now_ms - self._at_ms)
        self._level, self._at_ms = min(self._most, self._level + passed * self._per_ms), now_ms
        return self._level


class DeviceGate:
    """Checks the messages of one device."""

    def __init__(self, device: str, session_keys: SessionKeys, rounds_per_s: float) -> None:
        self._drafter_id = device_name(device)
        self._session_keys = session_keys
        self._rounds = RateBucket(rounds_per_s, max(1.0, rounds_per_s * BURST_S))
        self._hidden = RateBucket(HIDDEN_ROWS_PER_S, HIDDEN_ROWS)

    def wait_ms(self, now_ms: float) -> float:
        """Return how long the next message has to wait. Call it once for each message of any type."""
        return self._rounds.draw(1, now_ms)

    def check(self, message: Message, due_ms: float | None, now_ms: float) -> Verify:
        """Return the round, corrected where needed.

        due_ms: when the session's next token is due, as predicted by the scheduler. Raises RoundRefused.
        """
        if not isinstance(message, Verify):
            raise RoundRefused(f"a {message.type_name} is no round")
        if message.drafter != self._drafter_id:
            raise RoundRefused(f"the results would go to {message.drafter}")
        if not self._session_keys.accepts(message):
            raise RoundRefused("its session key is wrong or missing")
        if len(message.draft) > LONGEST_DRAFT:
            raise RoundRefused(f"its draft has {len(message.draft)} tokens; at most {LONGEST_DRAFT} are allowed")
        changed: dict[str, object] = {}
        slack_ms = None
        if message.tpot_ms is not None and message.slack_ms is not None:
            earliest = 0.0 if due_ms is None else due_ms - now_ms
            slack_ms = max(message.slack_ms, earliest)
        if slack_ms != message.slack_ms:
            changed["slack_ms"] = slack_ms
        if message.hidden_from is not None:
            rows = max(0, message.base_len - message.hidden_from) + len(message.draft) + 1
            if not self._hidden.take(rows, now_ms):
                changed["hidden_from"] = None
        return message.model_copy(update=changed) if changed else message
