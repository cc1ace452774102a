"""The profile of a target model on its hardware: the time of a step, and the memory left for KV.

A roofline calculates the time from data sheets: a step reads all weights and the KV of its sessions once, and computes
two operations per weight and token. The slower of the two decides (S. Williams and others, Roofline, CACM 52(4), 2009),
plus a fixed time for starting the step. A measured profile has the coefficients of a cost model (`wisp calibrate`).
"""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from shared import cost
from shared.cost.fit import VerifierFit
from shared.cost.model import Shape
from shared.errors import SettingsError, in_words, quoted
from shared.messages import BatchShape, CostModel, Measurement

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
GB = 1e9
MOST_KV_TOKENS = 1e12
MOST_PROBLEMS = 5
LONGEST_STEP_MS = 1e9
"""Longest time of a step that the cost model takes."""
JOBS = (1, 2, 4, 8, 16, 32, 64)
NEW = (1, 2, 5, 9, 65, 257)
LENGTHS = (64, 512, 2048)
"""Jobs, new tokens of each and lengths of the steps that the cost model is fitted to."""


class TargetProfile(BaseModel, ABC):
    """A target and its accelerator. The shipped files, in `shared/twin/targets`, name the source of each figure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = ""

    @property
    @abstractmethod
    def kv_tokens(self) -> int:
        """Tokens whose KV fits beside the weights. Raises SettingsError if there is no room, or absurdly much."""

    @abstractmethod
    def time_ms(self, shape: Shape) -> float:
        """Return the time of a step, in milliseconds; 0 for an empty one. Raises SettingsError for absurd times."""

    def cost_model(self, verifier_id: str) -> CostModel:
        """Return the model by which the scheduler predicts: the estimator's fit to steps of this target."""
        return self._fitted.model_copy(update={"verifier": verifier_id})

    @cached_property
    def _fitted(self) -> CostModel:
        fit = VerifierFit("any")
        fit.start_from(
            [
                Measurement(shape=shape, measured_ms=self.time_ms(shape))
                for jobs in JOBS
                for new in NEW
                for length in LENGTHS
                if jobs * length <= self.kv_tokens and jobs * new <= 2 * 2048 and new <= length
                for shape in [_even(jobs, new, length)]
            ]
        )
        return fit.model()


class RooflineProfile(TargetProfile):
    """A profile that calculates its times from data sheets."""

    weights: Positive
    """Number of weights."""
    weight_bytes: Positive
    """Bytes of a weight."""
    layers: Annotated[int, Field(gt=0)]
    heads: Annotated[int, Field(gt=0)]
    """Query heads."""
    kv_heads: Annotated[int, Field(gt=0)]
    head_size: Annotated[int, Field(gt=0)]
    kv_bytes: Positive
    """Bytes of a number in the KV cache."""
    memory_gb: Positive
    memory_share: Share
    """Share of the memory that the engine uses."""
    reserved_gb: Amount
    """Memory for activations and the runtime."""
    tflops: Positive
    """Peak of dense arithmetic in the weights' format, in 10^12 operations a second."""
    arithmetic_efficiency: Share
    bandwidth_gb: Positive
    """Peak memory bandwidth in GB/s."""
    bandwidth_efficiency: Share
    step_ms: Amount
    """Fixed time of a step."""

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of KV per token: keys and values of each layer and KV head."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.kv_bytes

    @cached_property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits beside the weights. Raises SettingsError if there is no room, or absurdly much."""
        free = (self.memory_gb * self.memory_share - self.reserved_gb) * GB - self.weights * self.weight_bytes
        if not free >= self.kv_token_bytes:  # nan included: both may be infinite
            raise SettingsError(
                f"{self.weights / 1e9:g} billion weights of {self.weight_bytes:g} bytes leave no room for KV in "
                f"{self.memory_share:.0%} of {self.memory_gb:g} GB; choose more memory or smaller weights"
            )
        if free / self.kv_token_bytes > MOST_KV_TOKENS:
            raise SettingsError(
                f"{self.memory_gb:g} GB hold the KV of more than {MOST_KV_TOKENS:g} tokens; "
                "check memory_gb and kv_bytes"
            )
        return int(free / self.kv_token_bytes)

    def time_ms(self, shape: Shape) -> float:
        """Return the time of a step, in milliseconds; 0 for an empty one. Raises SettingsError for absurd times."""
        if not shape.jobs:
            return 0.0
        read = self.weights * self.weight_bytes + shape.context * self.kv_token_bytes
        memory_s = read / (self.bandwidth_gb * 1e9 * self.bandwidth_efficiency)
        # Scores and values: two products over the head size for each query head.
        attention = 2 * 2 * self.layers * self.heads * self.head_size * shape.new_context
        operations = 2 * self.weights * shape.new_tokens + attention
        arithmetic_s = operations / (self.tflops * 1e12 * self.arithmetic_efficiency)
        took_ms = self.step_ms + 1000 * max(memory_s, arithmetic_s)
        if not took_ms <= LONGEST_STEP_MS:
            raise SettingsError(
                f"a step of {shape.new_tokens:,} tokens takes {took_ms:g} ms; check bandwidth_gb, tflops and step_ms"
            )
        return took_ms


class MeasuredBatch(BaseModel):
    """A measured batch of equal jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jobs: Annotated[int, Field(gt=0)]
    new: Annotated[int, Field(gt=0)]
    """New tokens of each job."""
    rows: Annotated[int, Field(ge=0)]
    """Rows of logits of each job."""
    context: Annotated[int, Field(ge=0)]
    """Cached tokens of each job."""
    times_ms: Annotated[list[Positive], Field(min_length=1)]
    """All measured times."""


class MeasuredProfile(TargetProfile):
    """A profile that `wisp calibrate` measured."""

    kind: Literal["measured"]
    facts: dict[str, Any] = {}
    """The model, the machine, the format of the weights, the threads, the versions of libraries and the date."""
    cache_tokens: Annotated[int, Field(gt=0, le=MOST_KV_TOKENS)]
    """Tokens in the KV cache."""
    coefficients: Annotated[list[Amount], Field(min_length=cost.SIZE, max_length=cost.SIZE)]
    """See `shared.cost.model`."""
    knee: Annotated[int, Field(gt=0)]
    error_p50: Amount = 0.0
    """Median of the error of the coefficients' prediction, as a share of the measured time."""
    error_p90: Amount = 0.0
    batches: list[MeasuredBatch] = []

    @property
    def kv_tokens(self) -> int:
        return self.cache_tokens

    def time_ms(self, shape: Shape) -> float:
        took_ms = cost.predict_ms(self._model, shape)
        if not took_ms <= LONGEST_STEP_MS:
            raise SettingsError(f"a step of {shape.new_tokens:,} tokens takes {took_ms:g} ms; check coefficients")
        return took_ms

    @cached_property
    def _model(self) -> CostModel:
        changes = {"coefficients": self.coefficients, "knee": self.knee}
        return cost.FALLBACK.model_copy(update=changes)


def _even(jobs: int, new: int, length: int) -> BatchShape:
    rows = new if new < 65 else 1
    return cost.shape_of([(new, length, rows)] * jobs)


def parse_target(text: str, name: str) -> TargetProfile:
    """Parse a roofline in TOML or a measured profile in JSON. name: of the file, for errors. Raises SettingsError."""
    try:
        if text.lstrip().startswith("{"):
            return MeasuredProfile.model_validate_json(text)
        return RooflineProfile.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise SettingsError(f"target profile {name}: {problems_in(error)}") from error
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and dates that do not exist
        raise SettingsError(f"target profile {name} is not TOML: {error}") from error


def problems_in(error: ValidationError) -> str:
    """Describe each problem of a file's fields: its place, what is wrong, and the given value."""
    shown = [_problem(one) for one in error.errors()[:MOST_PROBLEMS]]
    more = error.error_count() - len(shown)
    return "; ".join([*shown, f"and {more} more"] if more else shown)


def _problem(one: ErrorDetails) -> str:
    place = f"{'.'.join(map(str, one['loc']))}: " if one["loc"] else ""
    if one["type"] == "extra_forbidden":
        return f"{place}there is no such field"
    given = f" (given: {quoted(one['input'])})" if isinstance(one["input"], str | int | float) else ""
    return f"{place}{in_words(one)}{given}"
