"""Settings of the verifier."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from shared.cost.model import SIZE
from shared.runtime.settings import ServiceSettings, SessionSecretSettings, SessionTtlSettings, TargetSettings

KvHandoff = Literal["off", "drain", "write-through"]


class VerifierSettings(ServiceSettings, TargetSettings, SessionTtlSettings, SessionSecretSettings):
    """Settings of one verifier process: one target model on one torch device."""

    device: str = Field("cpu", description="torch device of the target model: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, le=256, description="CPU threads for the model")
    cache_tokens: int = Field(10240, ge=64, description="KV budget in tokens, shared prefixes counted once")
    keep_hidden: bool = Field(
        True, description="keep the target's hidden states (5 % of the KV memory) for drafters that ask for them"
    )
    profile: bool = Field(True, description="measure batches of several shapes at the start, for the cost model")
    heartbeat_ms: int = Field(500, ge=50, le=1000, description="time between heartbeats, in milliseconds")
    kv_handoff: KvHandoff = Field(
        "off",
        description="KV saved in Redis for other verifiers: none, all at the end after SIGTERM, or all as it is "
        "computed",
    )
    kv_handoff_mb: int = Field(512, ge=1, description="most megabytes of KV in Redis, of all verifiers together")
    kv_handoff_s: float = Field(120.0, gt=0, description="seconds that KV stays in Redis after its last use")
    drain_s: float = Field(20.0, ge=0, description="longest time to finish accepted batches after SIGTERM, in seconds")
    emulated_cost: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        [],
        description="coefficients of a cost model, as JSON: every batch takes at least the milliseconds that it "
        "predicts, to run more verifiers than there are cores; none in production",
    )

    @field_validator("emulated_cost")
    @classmethod
    def _is_complete(cls, coefficients: list[float]) -> list[float]:
        if coefficients and len(coefficients) != SIZE:
            raise ValueError(f"{len(coefficients)} coefficients: give all {SIZE} coefficients of a cost model, or none")
        return coefficients
