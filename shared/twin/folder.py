"""The folder of a twin: a model folder whose weights are a target profile.

`target.toml` or `target.json` is the profile, `trace.npz` an optional trace, `twin.json` the rest. config.json and the
tokenizer are those of a model folder, so every service takes the folder as its target (WISP_TARGET).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from shared.errors import ModelError
from shared.models.folder import ModelFolder
from shared.twin.files import target_text
from shared.twin.layout import PROFILES, SPEC, TRACE
from shared.twin.profile import TargetProfile, parse_target, problems_in
from shared.twin.spec import DRAFT_STEP_MS, Acceptance, TwinSpec
from shared.twin.text import SyntheticText
from shared.twin.trace import Trace, TraceText, load_trace

CONTEXT = 32768
"""Most tokens of a session, if the KV memory holds as many."""
MOST_WORDS = 512
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_WORD, _LETTER = re.compile(r"[Ġ▁][a-z]{5,}"), re.compile(r"[a-z]")


@dataclass(frozen=True)
class TwinFolder:
    """A twin's folder. `open` reads it, `write_twin` makes it."""

    path: Path
    spec: TwinSpec
    profile: TargetProfile

    @classmethod
    def open(cls, path: Path) -> TwinFolder:
        """Read a folder. Raises ModelError if it is no twin, and SettingsError for a bad profile."""
        try:
            spec = TwinSpec.model_validate_json((path / SPEC).read_bytes())
            file = next(path / name for name in PROFILES if (path / name).is_file())
            text = file.read_text(encoding="utf-8")
        except (OSError, StopIteration, UnicodeDecodeError) as error:
            raise ModelError(f"{path} is no twin ({error or 'it has no target profile'}); make it again") from error
        except ValidationError as error:
            raise ModelError(f"{path / SPEC}: {problems_in(error)}; make the twin again") from error
        return cls(path, spec, parse_target(text, str(file)))

    @cached_property
    def trace(self) -> Trace | None:
        """The trace, if answers and drafts come from one. Raises ModelError."""
        return load_trace(self.path / TRACE) if (self.path / TRACE).is_file() else None

    def text(self) -> SyntheticText | TraceText:
        """Return the twin's answers. Raises ModelError."""
        return SyntheticText(self.spec) if self.trace is None else TraceText(self.trace)


def write_twin(
    target: str,
    tokenizer: Path,
    to: Path,
    acceptance: Acceptance | None = None,
    *,
    trace: Path | None = None,
    draft_step_ms: float = DRAFT_STEP_MS,
    computed: Path | None = None,
) -> TwinFolder:
    """Write the twin of a target profile, by name or path, with the tokenizer of a model folder; return it.

    trace: gives answers and drafts; without one they are words with an `acceptance`. draft_step_ms, computed: see
    `TwinSpec`. Raises SettingsError for a bad profile, and ModelError for a trace of another vocabulary.
    """
    return _Twin(target, tokenizer, acceptance or Acceptance(), trace, draft_step_ms, computed).write(to)


def write_own_twin(
    target: str, tokenizer: Path, under: Path, acceptance: Acceptance | None = None, *, trace: Path | None = None
) -> TwinFolder:
    """Return the twin in a folder of its own, `under`/DIGEST/NAME, which is written once.

    Another acceptance, trace or tokenizer has another digest, so the twin of a running suite stays as it is. Raises
    what `write_twin` raises.
    """
    twin = _Twin(target, tokenizer, acceptance or Acceptance(), trace, DRAFT_STEP_MS)
    to = under / twin.folder_digest / Path(target).stem
    try:
        return TwinFolder.open(to)
    except ModelError:  # not written yet, or not to its end
        return twin.write(to)


class _Twin:
    """The contents of a twin's folder."""

    def __init__(
        self,
        target: str,
        tokenizer: Path,
        acceptance: Acceptance,
        trace: Path | None,
        draft_step_ms: float,
        computed: Path | None = None,
    ) -> None:
        """Parameters and errors: see `write_twin`."""
        self._tokenizer, self._trace = tokenizer, trace
        self._text = target_text(target)
        self._profile = parse_target(self._text, target)
        self._config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
        stop = self._config.get("eos_token_id")
        if isinstance(stop, list):
            stop = stop[0] if stop else None
        words = None if trace else _words(tokenizer)
        self._spec = TwinSpec(
            acceptance=acceptance,
            draft_step_ms=draft_step_ms,
            words=words,
            stop_id=stop,
            computed=None if computed is None else str(computed.absolute()),
        )
        digests = [self._text, self._spec.model_dump_json()]
        if trace is not None:
            digests.append(hashlib.sha256(trace.read_bytes()).hexdigest())
        self._weights_digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def folder_digest(self) -> str:
        """First characters of a digest of everything in the folder."""
        digest = hashlib.sha256(self._weights_digest.encode() + str(self._config["vocab_size"]).encode())
        for name in _TOKENIZER:
            if (self._tokenizer / name).is_file():
                digest.update(name.encode() + (self._tokenizer / name).read_bytes())
        return digest.hexdigest()[:8]

    def write(self, to: Path) -> TwinFolder:
        """Write the folder. Until that is done it is no twin. Raises ModelError for a trace of another vocabulary."""
        spec, trace = self._spec, self._trace
        to.mkdir(parents=True, exist_ok=True)
        for name in (SPEC, *PROFILES, TRACE):
            (to / name).unlink(missing_ok=True)
        for name in _TOKENIZER:
            if (self._tokenizer / name).is_file():
                shutil.copyfile(self._tokenizer / name, to / name)
        if trace is not None:
            shutil.copyfile(trace, to / TRACE)
        profile_name = PROFILES[self._text.lstrip().startswith("{")]
        (to / profile_name).write_text(self._text, encoding="utf-8")
        (to / "config.json").write_text(
            json.dumps(
                {
                    "model_type": "wisp-twin",
                    "vocab_size": self._config["vocab_size"],
                    "max_position_embeddings": min(CONTEXT, self._profile.kv_tokens),
                    "hidden_size": 1,
                    "eos_token_id": spec.stop_id,
                }
            )
        )
        # The digest of the weights, as in a description of a model: all verifiers of one twin give the same answers.
        (to / "weights.sha256").write_text(self._weights_digest + "\n")
        if trace is not None:
            _check_vocabulary(load_trace(trace), trace, to)
        (to / SPEC).write_text(spec.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return TwinFolder(to, spec, self._profile)


def _check_vocabulary(trace: Trace, path: Path, folder: Path) -> None:
    """Raise ModelError if a trace has not the vocabulary of this folder."""
    if trace.facts.get("vocabulary") != ModelFolder(folder).vocab_fingerprint:
        raise ModelError(f"the trace {path} was recorded with another vocabulary than the tokenizer's")


def _words(folder: Path) -> list[int]:
    """Return tokens that are words of their own, or letters in a tokenizer of bytes. Raises ModelError."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    for pattern in (_WORD, _LETTER):
        found = sorted(number for token, number in vocabulary.items() if pattern.fullmatch(token))
        if len(found) > 2:
            return found[:MOST_WORDS]
    raise ModelError(f"{folder} has a tokenizer without English words, of which a twin's answers consist")
