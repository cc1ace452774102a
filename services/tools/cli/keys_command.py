"""`wisp keys`: the API keys in a gateway's file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.tools.cli.program import Program
from services.tools.cli.terminal import err, errors_shown, out
from shared.errors import SettingsError
from shared.runtime.files import behind_links, replacing

if TYPE_CHECKING:
    from services.gateway.keys import ApiKey

app = Program(help="Create, list and revoke the API keys of a gateway.", no_args_is_help=True)

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
        for key in _read(_existing(file)):
            limits = (key.requests_per_minute, key.tokens_per_minute, key.max_sessions)
            shown = ("-" if limit is None else f"{limit:,}" for limit in limits)
            table.add_row(key.id, key.name, f"{key.created:%Y-%m-%d %H:%M}", *shown, key.device or "-")
        out.print(table)


@app.command("revoke")
def revoke(who: Annotated[str, typer.Argument(help="Id or name of the key.")], file: File = None) -> None:
    """Remove a key from the file. Running gateways refuse it within two seconds; its running sessions continue."""
    with errors_shown():
        with _editing(_existing(file)) as keys:
            key = _found(who, keys)
            keys.remove(key)
        out.print(f"revoked {key.name} ({key.id})")


def _found(who: str, keys: list[ApiKey]) -> ApiKey:
    if (key := next((key for key in keys if who in (key.id, key.name)), None)) is None:
        raise SettingsError(f"no key has the id or name {who!r}; `wisp keys list` shows them")
    return key


def _path(given: Path | None) -> Path:
    from services.tools.local.settings import LocalSettings

    path = given or LocalSettings().api_keys_file
    if path is None:
        raise SettingsError(
            "no file of API keys is given: use --file FILE, or set WISP_API_KEYS_FILE as for the gateway"
        )
    return path


def _existing(given: Path | None) -> Path:
    """Return the path of the file, which must exist. Raises SettingsError."""
    path = _path(given)
    if not path.exists():
        raise SettingsError(f"there is no file {path}; `wisp keys new NAME --file {path}` makes it with a first key")
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
        folder = os.open(behind_links(path).parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SettingsError(f"the API keys cannot be written: {error}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = _read(path)
        yield keys
        with replacing(path, 0o600) as draft:
            draft.write_text(render(keys), "utf-8")
    except OSError as error:
        raise SettingsError(f"the API keys cannot be written: {error}") from error
    finally:
        os.close(folder)
