"""Keys of sessions: who shows one was given the session by a gateway, and claims nothing else of it. Pure.

A gateway puts the key into the session's Generate. The drafter that gets it shows it with each round, and scheduler and
verifier check it, without asking anybody: it is a MAC, under a secret that gateways, schedulers and verifiers share and
drafters do not know, of what a drafter must not choose itself: the session, who is told of its results, and what it was
promised. It is good for one session only and says nothing about another's.
"""

from __future__ import annotations

import hmac
import json
from hashlib import sha256

from shared.messages import Generate, Job, Verify


class Seal:
    """Makes and checks keys. Without a secret every session's key is empty and everything fits."""

    def __init__(self, secret: str | None) -> None:
        self._secret = secret.encode() if secret else None

    @property
    def used(self) -> bool:
        """Whether keys are asked for."""
        return self._secret is not None

    def key(self, session: str, gateway: str, service_class: str, tpot_ms: float | None) -> str:
        """The key of a session; 128 bits in hexadecimal digits, or empty."""
        if self._secret is None:
            return ""
        told = json.dumps([session, gateway, service_class, None if tpot_ms is None else float(tpot_ms)])
        return hmac.new(self._secret, told.encode(), sha256).hexdigest()[:32]

    def sealed(self, generate: Generate) -> Generate:
        """The same with its key."""
        tpot_ms = generate.slo.tpot_ms if generate.slo else None
        key = self.key(generate.session, generate.gateway, generate.service_class, tpot_ms)
        return generate.model_copy(update={"session_key": key})

    def fits(self, told: Verify | Job) -> bool:
        """Whether a round or a job shows the key of its session, and changes nothing that it seals."""
        if self._secret is None:
            return True
        key = self.key(told.session, told.gateway, told.service_class, told.tpot_ms)
        return hmac.compare_digest(key, told.session_key)
