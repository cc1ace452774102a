"""Files of a model folder: its JSON files, and digests that are computed once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import ModelError, SettingsError
from shared.models.weight_files import refuse_pointer
from shared.runtime.files import replacing

# A file rewritten within a clock tick of its digest keeps its mtime, so only digests of older files are stored.
_SETTLED_S = 2.0


def require_file(file: Path) -> None:
    """Raise ModelError if a folder lacks one of its files."""
    if not file.is_file():
        raise ModelError(
            f"{file.parent} lacks {file.name}. A model folder needs config.json, safetensors weights and "
            "tokenizer.json: download the model again in full, or name another folder."
        )


def read_object(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if an optional file is missing. Raises ModelError."""
    if optional and not file.is_file():
        return {}
    require_file(file)
    try:
        read = file.read_bytes()
        refuse_pointer(file, read)
        content = json.loads(read)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} can't be read ({error}). Download the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object. Download the model again.")
    return content


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def stored_digest(files: Sequence[Path], store: Path) -> str:
    """Return the SHA-256 over large files, from `store` while size and modification time of all are unchanged.

    Otherwise it is computed (0.2 to 0.7 s for 270 MB) and stored.
    """
    state = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    kept = read_object(store, optional=True)
    if kept.get("files") == state:
        return str(kept["sha256"])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    newest_s = max(mtime_ns for _size, mtime_ns in state.values()) / 1e9
    if time.time() - newest_s > _SETTLED_S:
        # In a read-only folder, or one of another user, the digest is computed again next time.
        with contextlib.suppress(OSError, SettingsError), replacing(store) as partial:
            partial.write_text(json.dumps({"files": state, "sha256": digest.hexdigest()}))
    return digest.hexdigest()
