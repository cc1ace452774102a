"""Files of target profiles and traces: the shipped ones, and those of users."""

from __future__ import annotations

from pathlib import Path

from shared.errors import SettingsError
from shared.twin.profile import TargetProfile, parse_target

SHIPPED = Path(__file__).parent / "targets"
TRACES = Path(__file__).parent / "traces"
SUFFIXES = (".toml", ".json")


def shipped_targets() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in SHIPPED.iterdir() if path.suffix in SUFFIXES)


def target_text(wanted: str) -> str:
    """Return the text of a shipped profile by name, or of a file by path. Raises SettingsError."""
    named = [SHIPPED / f"{wanted}{suffix}" for suffix in SUFFIXES] if wanted in shipped_targets() else []
    path = next((path for path in named if path.is_file()), Path(wanted))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"target profile {wanted!r} cannot be read ({reason}); give the path of a file, or one of "
            f"{', '.join(shipped_targets())}"
        ) from error


def load_target(wanted: str) -> TargetProfile:
    """Return a shipped profile by name, or that of a file by path. Raises SettingsError."""
    return parse_target(target_text(wanted), wanted)


def shipped_traces() -> list[str]:
    """Return the names of the shipped traces."""
    return sorted(path.stem for path in TRACES.glob("*.npz"))


def trace_path(wanted: str) -> Path:
    """Return the file of a shipped trace by name, or the given path."""
    return TRACES / f"{wanted}.npz" if wanted in shipped_traces() else Path(wanted)
