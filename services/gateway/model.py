"""The served model: its name in the API, its tokenizer and its limits, without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from shared.grammar.masks import Grammars
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
    grammars: Grammars
    """Of answers; sessions follow them in the verifiers."""

    @classmethod
    def load(cls, settings: TargetSettings, name: str = "") -> ServedModel:
        """Read the target's folder. The default name is the folder's. Raises ModelError."""
        folder = ModelFolder(settings.target)
        tokenizer = Tokenizer(folder)
        return cls(
            name or folder.name,
            folder,
            tokenizer,
            folder.fingerprint(settings.dtype),
            folder.vocab_fingerprint,
            Grammars(lambda: tokenizer, folder.vocab_size, folder.eos_ids),
        )
