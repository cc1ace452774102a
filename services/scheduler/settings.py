"""Settings of the scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import SchedulingRules
from services.scheduler.core.policies import PolicyName, PolicyOptions, PolicyPart
from shared.broker.topology import DEFAULT_POOL
from shared.runtime.settings import NAME_PATTERN, ServiceSettings, SessionSecretSettings


class SchedulerSettings(ServiceSettings, SessionSecretSettings):
    """Settings of one scheduler process. Several may run; the broker makes one of them active."""

    policy: PolicyName = Field("wisp+", description="batch policy: which pending rounds make up the next batch")
    without: list[PolicyPart] = Field(
        [], description="parts of wisp and wisp+ to leave out, as JSON, to see what each brings; none in production"
    )
    max_batch_ms: float = Field(400.0, gt=0, description="longest predicted time of a batch, in milliseconds")
    max_batch_tokens: int = Field(2048, ge=128, description="most tokens computed in one batch")
    max_wait_ms: float = Field(
        3000.0,
        gt=0,
        description="milliseconds after which a round goes before all that arrive later, whatever their SLOs",
    )
    sled_batch: int = Field(8, ge=1, description="rounds in a batch of the policy sled")
    sled_fill_ms: float = Field(
        50.0, ge=0, description="longest time that the policy sled waits for a batch to fill, in milliseconds"
    )
    max_draft: int = Field(16, ge=0, description="longest draft that drafters may send")
    mixed_arithmetic: Literal["refuse", "allow"] = Field(
        "refuse",
        description="sessions whose arithmetic no verifier has any more: wait for one until they time out, or continue "
        "in another and report it with the answer",
    )
    devices_file: Path | None = Field(
        None, description="JSON list of the names of accepted devices, read again when it changes"
    )
    device_rounds_per_s: float = Field(100.0, gt=0, description="most rounds of one device per second")
    stand_in_pools: list[Annotated[str, Field(pattern=NAME_PATTERN)]] = Field(
        [DEFAULT_POOL],
        description="pools, as JSON, whose requests the scheduler serves without drafts while no drafter has room for "
        "them; [] leaves them waiting",
    )
    stand_in_sessions: int = Field(
        64, ge=1, le=10000, description="sessions of each of these pools that one scheduler serves at once"
    )
    load_ms: int = Field(500, ge=50, description="time between Load messages to drafters and gateways, in milliseconds")

    @model_validator(mode="after")
    def _devices_need_keys(self) -> SchedulerSettings:
        if self.devices_file is not None and self.session_secret is None:
            raise ValueError(
                "devices_file is set, and devices are trusted with nothing but the key of each session: set "
                "WISP_SESSION_SECRET for gateways, schedulers and verifiers"
            )
        return self

    @property
    def rules(self) -> SchedulingRules:
        """Configuration of the dispatcher."""
        limits = BatchLimits(self.max_batch_ms, self.max_batch_tokens, self.max_wait_ms)
        options = PolicyOptions(self.sled_batch, self.sled_fill_ms, frozenset(self.without))
        return SchedulingRules(self.policy, limits, self.max_draft, options, mix=self.mixed_arithmetic == "allow")
