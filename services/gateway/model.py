"""The served model: its name in the API, its tokenizer and its limits, without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.runtime.settings import TargetSettings


@dataclass(frozen=True)
class ServedModel:
    """The target model as the API shows it."""

    name: str
    folder: ModelFolder
    tokenizer: Tokenizer
    fingerprint: str
    """Of the weights and their dtype: verifiers with the same fingerprint serve this model."""
    vocab_fingerprint: str

    @classmethod
    def load(cls, settings: TargetSettings, name: str = "") -> ServedModel:
        """Read the target's folder. The default name is the folder's. Raises ModelError."""
        folder = ModelFolder(settings.target)
        return cls(
            name or folder.name,
            folder,
            Tokenizer(folder),
            folder.fingerprint(settings.dtype),
            folder.vocab_fingerprint,
        )
