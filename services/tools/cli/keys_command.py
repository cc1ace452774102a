"""`wisp keys`: the API keys in a gateway's file."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.tools.cli.terminal import err, errors_shown, out
from shared.errors import SettingsError

if TYPE_CHECKING:
    from services.gateway.keys import ApiKey

app = typer.Typer(help="Create, list and revoke the API keys of a gateway.", no_args_is_help=True)

File = Annotated[
    Path | None, typer.Option("--file", help="File of API keys. \\[env: WISP_API_KEYS_FILE]", show_default=False)
]


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Owner of the key: letters, digits, _ and -.")],
    file: File = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Limit on requests. \\[default: the gateway's]")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Limit on prompt and output tokens. \\[default: the gateway's]")
    ] = None,
    max_sessions: Annotated[
        int | None, typer.Option(min=1, help="Limit on concurrent completions. \\[default: the gateway's]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Remote device that uses the key and drafts for it.")] = None,
) -> None:
    """Create a key and print it once. Running gateways accept it within two seconds."""
    from services.gateway.keys import new_key
    from services.gateway.settings import KeyLimits

    with errors_shown(), _editing(_path(file)) as keys:
        if any(key.name == name for key in keys):
            raise SettingsError(f"a key named {name!r} exists; choose another name, or revoke it first")
        limits = KeyLimits(
            requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, max_sessions=max_sessions
        )
        try:
            text, key = new_key(name, datetime.now(UTC).replace(microsecond=0), limits, device)
        except ValueError:
            raise SettingsError(
                f"name {name!r}, device {device!r}: letters, digits, _ and - only, 64 at most"
            ) from None
        keys.append(key)
    print(text)
    err.print("Keep it: the file holds only its hash, so it cannot be shown again.", style="dim")


@app.command("list")
def list_keys(file: File = None) -> None:
    """List the keys in the file, without their secrets."""
    with errors_shown():
        table = Table(box=None)
        for column in ("id", "name", "created", "requests/min", "tokens/min", "sessions", "device"):
            table.add_column(column, overflow="fold")
        for key in _read(_path(file)):
            limits = (key.requests_per_minute, key.tokens_per_minute, key.max_sessions)
            shown = ("-" if limit is None else f"{limit:,}" for limit in limits)
            table.add_row(key.id, key.name, f"{key.created:%Y-%m-%d %H:%M}", *shown, key.device or "-")
        out.print(table)


@app.command("revoke")
def revoke(who: Annotated[str, typer.Argument(help="Id or name of the key.")], file: File = None) -> None:
    """Remove a key from the file. Running gateways refuse it within two seconds; its running sessions continue."""
    with errors_shown(), _editing(_path(file)) as keys:
        found = [key for key in keys if who in (key.id, key.name)]
        if not found:
            raise SettingsError(f"no key has the id or name {who!r}; `wisp keys list` shows them")
        keys.remove(found[0])
        out.print(f"revoked {found[0].name} ({found[0].id})")


def _path(given: Path | None) -> Path:
    from services.tools.local.settings import LocalSettings

    path = given or LocalSettings().api_keys_file
    if path is None:
        raise SettingsError(
            "no file of API keys is given: use --file FILE, or set WISP_API_KEYS_FILE as for the gateway"
        )
    return path


def _read(path: Path) -> list[ApiKey]:
    from services.gateway.keys import parse

    try:
        return parse(path.read_text("utf-8"), str(path))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the API keys cannot be read: {error}") from error


@contextmanager
def _editing(path: Path) -> Iterator[list[ApiKey]]:
    """Lock and read the keys; write them back at the end in one step, so that readers never see half a file."""
    from services.gateway.keys import render

    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SettingsError(f"the API keys cannot be written: {error}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = _read(path)
        yield keys
        draft = path.with_name(f".{path.name}.new")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(render(keys))
            _copy_permissions(path, file.fileno())
        draft.replace(path)
    except OSError as error:
        raise SettingsError(f"the API keys cannot be written: {error}") from error
    finally:
        os.close(folder)


def _copy_permissions(path: Path, written: int) -> None:
    """Give the new file the owner and mode of the old one, so that a gateway under another user can still read it."""
    try:
        before = path.stat()
    except FileNotFoundError:
        return
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        try:
            os.fchown(written, before.st_uid, before.st_gid)
        except PermissionError as error:
            raise SettingsError(f"{path} belongs to another user: make this change as that user, or as root") from error
    os.fchmod(written, stat.S_IMODE(before.st_mode))
