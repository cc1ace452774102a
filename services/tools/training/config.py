"""Settings of a training run, read from a TOML file. A missing setting has its default."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import SettingsError, in_words


class Section(BaseModel):
    """A table of the file. Unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompts(Section):
    """Prompts that the target answers."""

    count: int = Field(16_000, ge=1, description="prompts to answer, from the training templates")
    free_texts: int = Field(1_500, ge=0, description="passages of free text, read and not answered")
    held_out: int = Field(132, ge=11, description="prompts for evaluation, kept out of training")


class Generation(Section):
    """Generation of the target's answers."""

    workers: int = Field(1, ge=1, description="processes")
    threads: int = Field(1, ge=1, description="CPU threads of each process")
    sessions: int = Field(128, ge=1, description="texts generated at once in each process")
    max_prompt: int = Field(448, ge=8, description="tokens of the longest prompt; a longer one loses its beginning")
    max_new: int = Field(224, ge=1, description="tokens of the longest answer")
    temperatures: list[Annotated[float, Field(ge=0, le=2)]] = Field(
        [0.0, 0.5, 0.7, 0.7, 0.85, 1.0, 1.0], min_length=1, description="each with the same chance"
    )
    shard_tokens: int = Field(40_000, ge=1000, description="tokens in a file, approximately")


class Model(Section):
    """Shape of the draft model, whose layers are like the target's."""

    layers: int = Field(1, ge=1, description="trained layers")
    bottom_layers: int = Field(2, ge=0, description="first layers of the target that the draft runs unchanged")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the trained layers' position embedding")


class Stage(Section):
    """A stage of training with a fixed number of unrolled draft steps."""

    steps: int = Field(ge=1, le=8, description="draft steps; later ones take the model's own estimates as input")
    tokens: int = Field(ge=1, description="answer tokens to learn from, repetitions included")
    learning_rate: float = Field(gt=0, description="peak")


class Training(Section):
    """Optimisation of the draft model."""

    threads: int = Field(1, ge=1)
    batch_tokens: int = Field(768, ge=16, description="tokens in a batch, padding included")
    stages: list[Stage] = Field(
        [
            Stage(steps=1, tokens=5_000_000, learning_rate=1e-3),
            Stage(steps=3, tokens=2_500_000, learning_rate=6e-4),
        ],
        min_length=1,
    )
    frequent_rows: int = Field(4096, ge=1, description="rows of the head for the most frequent tokens")
    random_rows: int = Field(768, ge=0, description="rows drawn for each batch that stand for the other tokens")
    step_decay: float = Field(0.8, gt=0, le=1, description="weight of each draft step / weight of the previous one")
    regression: float = Field(0.1, ge=0, description="weight of the distance between estimated and true states")
    rejection: float = Field(1.0, ge=0, description="weight of the probability that the target rejects a token")
    weight_decay: float = Field(0.01, ge=0)
    fc_rate: float = Field(0.3, gt=0, description="learning rate of the input projection / the others'")
    warm_up: int = Field(30, ge=1, description="updates")
    final_rate: float = Field(0.03, ge=0, le=1, description="share of its peak to which the learning rate falls")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    drop_states: float = Field(0.05, ge=0, lt=1, description="share of texts whose first states are zeroed")
    head_rows: int = Field(8192, ge=0, description="most frequent tokens that the draft can propose; 0 for all")


class Config(Section):
    """Settings of a training run, from prompts to a draft model."""

    seed: int = 1
    device: str = Field("cpu", description="torch device for generation and training")
    target_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    prompts: Prompts = Field(default_factory=lambda: Prompts.model_validate({}))
    generation: Generation = Field(default_factory=lambda: Generation.model_validate({}))
    model: Model = Field(default_factory=lambda: Model.model_validate({}))
    training: Training = Field(default_factory=lambda: Training.model_validate({}))

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read the settings of a file. Raises SettingsError."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"{path}: {error}") from error
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {in_words(e)}" for e in error.errors())
            raise SettingsError(f"{path}: {problems}") from error

    def as_toml(self) -> str:
        """Return the settings as a file for `read`, each with its description."""
        lines: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if not isinstance(value, Section):
                lines.append(_setting(name, value, field.description))
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Section):
                lines += ["", f"[{name}]", *_lines(section)]
        return "\n".join(lines)


def _lines(section: Section) -> Iterator[str]:
    tables: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, list) and value and isinstance(value[0], Section):
            for entry in value:
                tables += ["", "[[training.stages]]", *_lines(entry)]
        else:
            yield _setting(name, value, field.description)
    yield from tables


def _setting(name: str, value: object, description: str | None) -> str:
    # Numbers, strings and lists look the same in JSON and TOML.
    return f"{name} = {json.dumps(value)}" + (f"  # {description}" if description else "")
