"""Builders of wire messages and stored records for tests.

Each builder gives every field a plain value, so a test names only the fields that it is about. The ids agree: drafter
`d`, gateway `g`, scheduler `s1`, verifier `v1`, session `s`, batch `b1`, model fingerprint `f`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.messages import (
    Batch,
    CostModel,
    DrafterHeartbeat,
    Ended,
    Generate,
    Heartbeat,
    HiddenFormat,
    HiddenStates,
    Job,
    Load,
    Residency,
    Result,
    Sampling,
    Status,
    Verify,
)
from shared.models.hidden_states import Bits, pack
from shared.state.sessions import Request

PROMPT = [5, 6, 7]


def generate(session: str = "s", **fields: Any) -> Generate:
    """A greedy request for ten tokens after the three of PROMPT."""
    plain = {
        "session": session,
        "gateway": "g",
        "prompt": PROMPT,
        "sampling": Sampling(),
        "stop_ids": [2],
        "max_tokens": 10,
        "fingerprint": "f",
        "vocab_fingerprint": "v",
    }
    return Generate.model_validate(plain | fields)


def stored_request(session: str = "s", **fields: Any) -> Request:
    """The record that the gateway stores for the same request."""
    plain = {
        "session": session,
        "gateway": "g",
        "prompt_len": len(PROMPT),
        "sampling": Sampling(),
        "stop_ids": [2],
        "max_tokens": 10,
        "fingerprint": "f",
    }
    return Request.model_validate(plain | fields)


def verify(session: str = "s", round_: int = 0, base_len: int = 3, draft: Sequence[int] = (), **fields: Any) -> Verify:
    """A round without an SLO; each draft token has an even chance of acceptance."""
    plain = {
        "session": session,
        "round": round_,
        "base_len": base_len,
        "draft": list(draft),
        "acceptance": [0.5] * len(draft),
        "drafter": "d",
        "gateway": "g",
        "fingerprint": "f",
    }
    return Verify.model_validate(plain | fields)


def job(session: str = "s", round_: int = 0, base_len: int = 3, draft: Sequence[int] = (), **fields: Any) -> Job:
    """A round as it stands in a batch, with its draft untrimmed."""
    plain = {
        "session": session,
        "round": round_,
        "base_len": base_len,
        "draft": list(draft),
        "drafted": len(draft),
        "drafter": "d",
        "gateway": "g",
        "fingerprint": "f",
    }
    return Job.model_validate(plain | fields)


def batch(name: str = "b1", *jobs: Job, **fields: Any) -> Batch:
    """A batch of these jobs, or of one plain job."""
    plain = {
        "batch": name,
        "scheduler": "s1",
        "jobs": list(jobs) or [job()],
        "predicted_ms": 1.0,
        "policy": "fcfs",
    }
    return Batch.model_validate(plain | fields)


def result(session: str = "s", round_: int = 0, base_len: int = 3, tokens: Sequence[int] = (), **fields: Any) -> Result:
    """A committed round of these tokens."""
    plain = {
        "session": session,
        "round": round_,
        "base_len": base_len,
        "tokens": list(tokens),
        "status": Status.COMMITTED,
        "verifier": "v1",
        "batch": "b1",
    }
    return Result.model_validate(plain | fields)


def hidden_states(
    start: int, bits: Bits, form: HiddenFormat = HiddenFormat.BFLOAT16, session: str = "s", round_: int = 0
) -> HiddenStates:
    """The rows `bits` (bfloat16 bits, one row per position from `start` on), packed in this format."""
    rows, scales = pack(bits, form)
    count, size = bits.shape
    return HiddenStates(
        session=session, round=round_, start=start, count=count, size=size, format=form, rows=rows, scales=scales
    )


def heartbeat(verifier: str = "v1", cached: Mapping[str, int] | None = None, **fields: Any) -> Heartbeat:
    """A verifier with room for 10,000 tokens; `cached` gives the tokens that it holds by session."""
    plain = {
        "verifier": verifier,
        "fingerprint": "f",
        "max_len": 8192,
        "free_tokens": 10_000,
        "total_tokens": 10_000,
        "residency": [Residency(session=session, cached=count) for session, count in (cached or {}).items()],
    }
    return Heartbeat.model_validate(plain | fields)


def drafter_heartbeat(drafter: str = "d", pool: str = "pool", **fields: Any) -> DrafterHeartbeat:
    """A drafter without sessions that has room for 64."""
    plain = {"drafter": drafter, "pool": pool, "sessions": 0, "max_sessions": 64}
    return DrafterHeartbeat.model_validate(plain | fields)


def cost_model(
    verifier: str = "v1", coefficients: Sequence[float] = (40.0, 1.0, 2.0, 5.0, 5.0), **fields: Any
) -> CostModel:
    """A cost model of few samples whose predictions are close: 40 ms per batch, 1 per job, 2 per new token."""
    plain = {
        "verifier": verifier,
        "coefficients": list(coefficients),
        "ratio_p50": 1.0,
        "ratio_p90": 1.1,
        "ratio_p99": 1.3,
        "samples": 9,
        "version": 1,
    }
    return CostModel.model_validate(plain | fields)


def load(price_ms: float = 0.0, **fields: Any) -> Load:
    """The load of idle verifiers, with this price of a token."""
    plain = {"scheduler": "s1", "price_ms": price_ms, "queue_ms": 1.0, "pending": 0, "draft_cap": 8}
    return Load.model_validate(plain | fields)


def ended(session: str = "s", reason: str = "stop", **fields: Any) -> Ended:
    """A completion of its own end, without an SLO."""
    return Ended.model_validate({"session": session, "reason": reason, "attained": True} | fields)
