"""The folder of a trained hidden-state draft. Loads no torch.

config.json         shape of the model, name and vocabulary of its target
model.safetensors   trained weights in bfloat16, and `head_ids`, the ids of the tokens that it can propose
controller.json     weights of the speculation controller for its drafts, if trained
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import ModelError
from shared.models.folder import ModelFolder

CONFIG, WEIGHTS, CONTROLLER = "config.json", "model.safetensors", "controller.json"
SHIPPED = Path(__file__).parent.parent / "drafts"


class LayerConfig(BaseModel):
    """Shape of a Llama decoder layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0, le=1 << 14, multiple_of=2)
    intermediate_size: int = Field(gt=0)
    rope_theta: float = Field(gt=0)
    norm_eps: float = Field(gt=0)

    @model_validator(mode="after")
    def _whole_groups(self) -> LayerConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly")
        return self


class HiddenDraftConfig(BaseModel):
    """Shape of the draft model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: LayerConfig
    layers: int = Field(ge=1)
    bottom_layers: int = Field(ge=0)
    """Number of the target's first layers that it runs."""
    vocab_size: int = Field(gt=0)


class DraftCard(BaseModel):
    """The content of config.json."""

    model_config = ConfigDict(frozen=True)

    model: HiddenDraftConfig
    target: str
    """Name of the target that the draft was trained for."""
    vocab_fingerprint: str


@dataclass(frozen=True)
class HiddenDraftFolder:
    """A folder with a trained draft."""

    path: Path
    card: DraftCard

    @classmethod
    def open(cls, path: Path) -> HiddenDraftFolder:
        """Read the folder's card. Raises ModelError if it is missing or invalid."""
        try:
            return cls(path, DraftCard.model_validate_json((path / CONFIG).read_bytes()))
        except OSError as error:
            raise _no_draft(path, error.strerror) from error
        except ValidationError as error:
            first = error.errors()[0]
            raise _no_draft(path, f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}") from error

    def fits(self, target: ModelFolder) -> bool:
        """Return whether the draft has the target's vocabulary and hidden size."""
        return (
            self.card.vocab_fingerprint == target.vocab_fingerprint
            and self.card.model.layer.hidden_size == target.hidden_size
        )

    @property
    def controller(self) -> Path | None:
        """File of the controller's weights that ship with the draft, if any."""
        path = self.path / CONTROLLER
        return path if path.is_file() else None


def _no_draft(path: Path, why: str | None) -> ModelError:
    return ModelError(f"{path} holds no hidden-state draft ({CONFIG}: {why}); `wisp draft train` makes one")


def shipped_for(target: ModelFolder) -> HiddenDraftFolder | None:
    """Return the draft that ships with WISP for this target, if any."""
    for config in sorted(SHIPPED.glob(f"*/{CONFIG}")):
        folder = HiddenDraftFolder.open(config.parent)
        if folder.fits(target):
            return folder
    return None
