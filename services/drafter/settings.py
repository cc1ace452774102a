"""Settings of the drafter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from services.drafter.control.rules import RuleName
from services.drafter.sources.registry import MODEL, SourceChoiceName
from shared.broker.topology import DEFAULT_POOL
from shared.messages import HiddenFormat
from shared.runtime.settings import NAME_PATTERN, BrokerSettings, ProcessSettings, ServiceSettings, TargetSettings


@dataclass(frozen=True)
class ServingOptions:
    """Settings of serving sessions, apart from their draft sources."""

    max_sessions: int
    """Sessions served at once."""
    min_timeout_ms: float
    """Shortest wait for a round's result."""
    draft_length: int
    """Longest draft per round."""
    hidden_format: HiddenFormat = HiddenFormat.BFLOAT16
    prepared_outcomes: int = 0
    """Most outcomes of a round in flight for which the next draft is prepared."""


class DraftSettings(TargetSettings):
    """The source of drafts, and their length."""

    draft_source: SourceChoiceName = Field(
        "auto",
        description="source of drafts; auto: combined if the target has a hidden-state draft, else lookup",
    )
    hidden_draft: Path | None = Field(
        None, description="folder of a hidden-state draft (wisp draft train); default: the one shipped for the target"
    )
    draft_model: Path | None = Field(
        None, description="folder of a draft model; one with the target's vocabulary fits best, a similar one too"
    )
    draft_dtype: Literal["bfloat16", "float32", "int8"] = Field(
        "bfloat16", description="format of the draft model's weights; int8 on the CPU only"
    )
    device: str = Field("cpu", description="torch device of the draft model")
    threads: int = Field(1, ge=1, le=256, description="CPU threads for the draft model")
    cache_tokens: int = Field(32768, ge=64, description="KV budget of the draft model, in tokens")
    stop_rule: RuleName = Field("marginal", description="rule that ends a draft; fixed always drafts to draft_length")
    controller: Path | None = Field(
        None, description="weights of the stop rule (wisp controller train); default: those of the hidden-state draft"
    )
    draft_length: int = Field(8, ge=0, le=64, description="longest draft per round")
    draft_learning: bool = Field(
        False, description="let the hidden-state draft learn from the sessions served here, while none is served"
    )
    draft_learning_folder: Path | None = Field(
        None, description="folder that keeps learned weights over restarts, and never texts; default: keep none"
    )
    draft_learning_tokens: int = Field(
        32768,
        ge=1024,
        le=1 << 24,
        description="most tokens to learn from that are held in memory, 2.3 KB each with the default target",
    )

    @model_validator(mode="after")
    def _draft_model_is_named(self) -> DraftSettings:
        if self.draft_source == MODEL and self.draft_model is None:
            raise ValueError("draft_source is 'model', so draft_model must name its folder (WISP_DRAFT_MODEL)")
        return self

    @model_validator(mode="after")
    def _learning_is_on_for_its_folder(self) -> DraftSettings:
        if self.draft_learning_folder is not None and not self.draft_learning:
            raise ValueError("draft_learning_folder keeps learned weights, so it needs WISP_DRAFT_LEARNING=true")
        return self


class DraftServingSettings(ProcessSettings, BrokerSettings, DraftSettings):
    """Serving sessions, in a drafter and on a device."""

    hidden_format: Literal["bfloat16", "int8"] = Field(
        "bfloat16", description="format of hidden states in messages; int8 halves their size"
    )
    prepared_outcomes: int = Field(
        0,
        ge=0,
        le=32,
        description="most outcomes of a round in flight for which the next draft is prepared (0: none); pays where a "
        "drafter with a core of its own drafts slowly for one session",
    )
    max_sessions: int = Field(
        64, ge=1, le=10000, description="sessions served at once; others go without drafts, or wait"
    )
    device_profile: str = Field(
        "",
        description="emulate this hardware: each session drafts and sends as slowly as a shipped profile "
        "(raspberry-pi-5, jetson-orin-nano, laptop, phone) or a TOML file",
    )
    min_timeout_ms: float = Field(250.0, gt=0, description="shortest wait for a round's result before it is sent again")

    @property
    def options(self) -> ServingOptions:
        """Options of the sessions' serving."""
        return ServingOptions(
            self.max_sessions,
            self.min_timeout_ms,
            self.draft_length,
            HiddenFormat(self.hidden_format),
            self.prepared_outcomes,
        )


class DrafterSettings(DraftServingSettings, ServiceSettings):
    """One drafter process. It takes requests from its pool's queue; several processes share a pool's work."""

    pool: str = Field(DEFAULT_POOL, pattern=NAME_PATTERN, description="pool of drafters whose requests to serve")
