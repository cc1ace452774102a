"""Settings of the scheduler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.settings import ServiceSettings


class SchedulerSettings(ServiceSettings):
    """One scheduler process. Several may run; the broker makes one of them active."""

    policy: Literal["fcfs", "edf"] = Field("edf", description="order in which waiting rounds get into batches")
    max_batch_ms: float = Field(400.0, gt=0, description="longest predicted time of a batch, in milliseconds")
    max_batch_tokens: int = Field(2048, ge=64, description="most tokens computed in one batch")
    max_draft: int = Field(16, ge=0, description="longest draft that drafters are told to send")
    load_ms: int = Field(500, ge=50, description="time between Load messages to drafters and gateways")
