"""Session keys: HMACs proving that a gateway gave this session to a drafter.

A gateway puts the key into the session's Generate. The drafter shows it with each round; scheduler and verifier
recompute and compare it. The HMAC covers what a drafter must not choose itself: the session, the gateway that gets its
results, and its promised speed. Gateways, schedulers and verifiers share the secret; drafters do not have it, so a key
is good for one session only.
"""

from __future__ import annotations

import hmac
import json
from hashlib import sha256

from shared.messages import Generate, Job, Verify


class SessionKeys:
    """Makes and checks session keys. Without a secret every key is empty and every round passes."""

    def __init__(self, secret: str | None) -> None:
        self._secret = secret.encode() if secret else None

    @property
    def required(self) -> bool:
        """True if rounds have to show a key."""
        return self._secret is not None

    def key(self, session_id: str, gateway_id: str, service_class: str, tpot_ms: float | None) -> str:
        """Return a session's key: 128 bits in hexadecimal digits, or "" without a secret."""
        if self._secret is None:
            return ""
        covered = json.dumps([session_id, gateway_id, service_class, None if tpot_ms is None else float(tpot_ms)])
        return hmac.new(self._secret, covered.encode(), sha256).hexdigest()[:32]

    def add_to(self, generate: Generate) -> Generate:
        """Return the request with its session's key."""
        tpot_ms = generate.slo.tpot_ms if generate.slo else None
        key = self.key(generate.session, generate.gateway, generate.service_class, tpot_ms)
        return generate.model_copy(update={"session_key": key})

    def accepts(self, shown: Verify | Job) -> bool:
        """Return whether a round shows its session's key and changes nothing that the key covers."""
        if self._secret is None:
            return True
        key = self.key(shown.session, shown.gateway, shown.service_class, shown.tpot_ms)
        return hmac.compare_digest(key, shown.session_key)
