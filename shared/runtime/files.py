"""Files that are written by replacement, so that readers see the old file or the new one and never half of one."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from shared.errors import SettingsError

ABANDONED_S = 3600.0
"""Age at which a new file that has not taken its place is taken for a killed process's."""


def behind_links(path: Path) -> Path:
    """Return the path of the file that `path` names, with all symbolic links followed. Raises OSError for a loop."""
    try:
        return path.resolve()
    except RuntimeError as error:  # how Python before 3.13 reports a loop
        raise OSError(f"{path}: the symbolic links form a loop") from error


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Give the path of a new, empty file, which takes the place of `path` at the end of the body.

    A symbolic link stays, and the file that it names is replaced. The new file gets the owner and the mode of the old
    one. mode: the mode where there is no old one; default: 0o666 without the process's umask. If the body raises an
    error, the old file stays as it is. Raises OSError, and SettingsError where the old owner cannot be kept.
    """
    real = behind_links(path)
    draft = real.with_name(f".{real.name}.{token_hex(4)}.new")
    try:
        old = real.stat()
    except FileNotFoundError:
        old = None
    # A file with secrets is private from its first moment on.
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if mode is None else mode))
    try:
        _remove_abandoned(real, draft.stat().st_mtime)
        if old is not None:
            draft.chmod(0o600)
        yield draft
        if old is not None:
            _keep_owner(path, draft, old)
            draft.chmod(stat.S_IMODE(old.st_mode))
        draft.replace(real)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def _remove_abandoned(real: Path, now_s: float) -> None:
    """Remove the new files of processes that were killed while they wrote. now_s: by the file system's clock."""
    for draft in real.parent.glob(f".{glob.escape(real.name)}.*.new"):
        with suppress(OSError):
            if now_s - draft.stat().st_mtime > ABANDONED_S:
                draft.unlink()


def _keep_owner(path: Path, draft: Path, old: os.stat_result) -> None:
    """Give the new file the old one's owner, so that a process of another user can still read it."""
    if (old.st_uid, old.st_gid) == (os.geteuid(), os.getegid()):
        return
    try:
        os.chown(draft, old.st_uid, old.st_gid)
    except PermissionError as error:
        raise SettingsError(f"{path} belongs to another user: make this change as that user, or as root") from error
