"""Settings of the verifier."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from shared.cost.model import SIZE
from shared.runtime.settings import (
    ServiceSettings,
    SessionSecretSettings,
    SessionTtlSettings,
    TargetSettings,
    WispSettings,
)

KvHandoff = Literal["off", "drain", "write-through"]


class GpuSettings(WispSettings):
    """Settings of an engine on GPUs."""

    gpu_memory: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of a GPU's memory for the model, its KV and buffers, at most what is free at the start",
    )
    gpus: int = Field(
        1,
        ge=1,
        le=16,
        description="GPUs of this node that compute the target together, from the device on; the target's heads are "
        "split among them",
    )

    @model_validator(mode="after")
    def _gpus_are_of_a_node(self) -> GpuSettings:
        device = getattr(self, "device", "cuda")
        if self.gpus > 1 and not device.startswith("cuda"):
            raise ValueError(f"WISP_GPUS={self.gpus} needs WISP_DEVICE=cuda, and it is {device}")
        return self


class VerifierSettings(ServiceSettings, TargetSettings, SessionTtlSettings, SessionSecretSettings, GpuSettings):
    """Settings of one verifier process: one target model on one torch device, or on several GPUs."""

    device: str = Field("cpu", description="torch device of the target model: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, le=256, description="CPU threads for the model")
    cache_tokens: int | None = Field(
        None,
        ge=64,
        description="KV budget in tokens, shared prefixes counted once; default: what WISP_GPU_MEMORY leaves with the "
        "kernels for GPUs, and 10240 elsewhere",
    )
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
        examples=[[20, 0, 0, 0, 0, 0, 0]],
        description="coefficients of a cost model, as JSON: every batch takes at least the milliseconds that it "
        "predicts, to run more verifiers than there are cores; none in production",
    )

    @model_validator(mode="after")
    def _hands_whole_blocks_over(self) -> VerifierSettings:
        if self.gpus > 1 and self.kv_handoff != "off":
            raise ValueError(
                "WISP_KV_HANDOFF must be off with WISP_GPUS over 1: each GPU holds a part of the KV, which is not "
                "handed over"
            )
        return self

    @field_validator("emulated_cost")
    @classmethod
    def _is_complete(cls, coefficients: list[float]) -> list[float]:
        if coefficients and len(coefficients) != SIZE:
            raise ValueError(f"{len(coefficients)} coefficients: give all {SIZE} coefficients of a cost model, or none")
        return coefficients
