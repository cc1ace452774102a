"""Which verifier a session's next round goes to. Pure.

A session stays where its K/V are: computing a prompt again costs far more than waiting for a batch. A session without
K/V anywhere goes to the verifier with the fewest sessions, so that new verifiers fill up first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.scheduler.pool import Pending, VerifierState


def home(session: str, verifiers: Iterable[VerifierState]) -> VerifierState | None:
    """The usable verifier that holds most of the session's tokens."""
    holders = [v for v in verifiers if v.usable and v.cached.get(session)]
    return max(holders, key=lambda v: (v.cached[session], v.name), default=None)


def place(pending: Pending, verifiers: Iterable[VerifierState], placed: Mapping[str, int]) -> VerifierState | None:
    """The verifier for a session that is nowhere yet; None while there is no usable verifier.

    `placed` counts the sessions already given to each verifier in the same decision. When no verifier serves the
    session's model, any of them may say so.
    """
    usable = [v for v in verifiers if v.usable]
    fitting = [v for v in usable if v.heartbeat.fingerprint == pending.verify.fingerprint] or usable
    roomy = [v for v in fitting if v.heartbeat.free_tokens >= pending.length_after] or fitting
    return min(roomy, key=lambda v: (v.sessions + placed.get(v.name, 0), v.name), default=None)
