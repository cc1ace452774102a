"""Settings of the baselines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from services.drafter.settings import DraftSettings
from services.gateway.settings import ApiSettings
from services.verifier.settings import GpuSettings
from shared.runtime.settings import ProcessSettings

Baseline = Literal["centralized", "colocated"]


class BaselineSettings(ProcessSettings, ApiSettings, DraftSettings, GpuSettings):
    """One server without other services: the gateway's HTTP API in front of an engine of its own."""

    serving: Baseline = Field(
        "centralized",
        description="centralized: plain decoding; colocated: drafts made and verified in the engine's process",
    )
    device: str = Field("cpu", description="torch device of the models: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of the models")
    cache_tokens: int = Field(
        10240,
        ge=64,
        description="KV budget in tokens, shared prefixes counted once; also the draft model's budget",
    )
    prefill_tokens: int = Field(
        128, ge=1, description="most prompt tokens in a step of the engine, beside the decodes of all sessions"
    )
    max_running: int = Field(64, ge=1, description="running sessions of the engine; others wait in order of arrival")

    @model_validator(mode="after")
    def _has_no_keys(self) -> BaselineSettings:
        if self.api_keys_file is not None:
            raise ValueError("a baseline requires no API keys: leave api_keys_file out")
        return self
