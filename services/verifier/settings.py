"""Settings of the verifier."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from shared.cost.model import SIZE
from shared.runtime.settings import ServiceSettings, SessionSecretSettings, SessionTtlSettings, TargetSettings

KvHandoff = Literal["off", "drain", "write-through"]


class VerifierSettings(ServiceSettings, TargetSettings, SessionTtlSettings, SessionSecretSettings):
    """One verifier process: one target model on one device."""

    device: str = Field("cpu", description="torch device of the target model: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, le=256, description="CPU threads for the model")
    cache_tokens: int = Field(10240, ge=64, description="K/V budget in tokens, shared prefixes counted once")
    keep_hidden: bool = Field(
        True, description="keep the target's hidden states (5 % of the K/V memory) for drafters that ask for them"
    )
    profile: bool = Field(True, description="measure batches of several shapes at the start, for the cost model")
    heartbeat_ms: int = Field(500, ge=50, le=1000, description="time between heartbeats")
    kv_handoff: KvHandoff = Field(
        "off",
        description="K/V left to other verifiers in Redis: none, those of a verifier that ends by SIGTERM, or all as "
        "they are computed",
    )
    kv_handoff_mb: int = Field(512, ge=1, description="most megabytes of K/V in Redis, of all verifiers together")
    kv_handoff_s: float = Field(120.0, gt=0, description="seconds that K/V stay in Redis after their last use")
    drain_s: float = Field(20.0, ge=0, description="longest time to finish accepted batches after SIGTERM")
    emulated_cost: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        [],
        description="let every batch take at least what a cost model with these coefficients says, in milliseconds, as "
        "JSON: to run more verifiers than there are cores; none in production",
    )

    @field_validator("emulated_cost")
    @classmethod
    def _is_whole(cls, coefficients: list[float]) -> list[float]:
        if coefficients and len(coefficients) != SIZE:
            raise ValueError(f"a cost model has {SIZE} coefficients, or give none")
        return coefficients
