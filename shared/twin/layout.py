"""Files of a twin's folder. Loads nothing slow: gateways look at them too."""

from __future__ import annotations

from pathlib import Path

SPEC = "twin.json"
PROFILES = ("target.toml", "target.json")
TRACE = "trace.npz"


def is_twin(folder: Path) -> bool:
    """Return whether a model folder is a twin."""
    return (Path(folder) / SPEC).is_file()
