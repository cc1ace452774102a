"""Settings of the drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from shared.settings import NAME_PATTERN, ServiceSettings
from shared.topology import DEFAULT_POOL


class DrafterSettings(ServiceSettings):
    """One drafter process. It takes requests from its pool's queue; several share the work."""

    pool: str = Field(DEFAULT_POOL, pattern=NAME_PATTERN, description="queue of requests to serve: a pool, or a device")
    draft_source: Literal["lookup", "model", "none"] = Field("lookup", description="where drafts come from")
    draft_model: Path | None = Field(None, description="folder of a draft model with the target's vocabulary")
    draft_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="number format of the draft model")
    device: str = Field("cpu", description="torch device of the draft model")
    threads: int = Field(1, ge=1, le=256, description="CPU threads for the draft model")
    cache_tokens: int = Field(16384, ge=64, description="K/V budget of the draft model, in tokens")
    draft_length: int = Field(4, ge=0, le=64, description="longest draft per round")
    max_sessions: int = Field(64, ge=1, le=10000, description="sessions served at once; others wait in the queue")
    min_timeout_ms: float = Field(250.0, gt=0, description="shortest wait for a round's result before it is sent again")

    @model_validator(mode="after")
    def _model_is_there(self) -> DrafterSettings:
        if self.draft_source == "model" and self.draft_model is None:
            raise ValueError("draft_source is 'model', so draft_model must name its folder (WISP_DRAFT_MODEL)")
        return self
