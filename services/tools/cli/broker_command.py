"""`wisp broker`: what an own RabbitMQ has to know of users, permissions and queues."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any

import typer

from services.tools.cli.terminal import err, errors_shown
from shared.broker.access import definitions, device_definitions, joined, user_of
from shared.broker.topology import DEFAULT_POOL, ROLES, Topology, device_name
from shared.errors import SettingsError

app = typer.Typer(help="What an own RabbitMQ is set up with.", no_args_is_help=True)


@app.command("definitions")
def print_definitions(
    passwords: Annotated[
        Path, typer.Option(help="JSON file of the users' passwords; those that are not in it are drawn and added.")
    ],
    namespace: Annotated[str | None, typer.Option(help="\\[env: WISP_NAMESPACE; default: wisp]")] = None,
    vhost: Annotated[str, typer.Option(help="Virtual host.")] = "/",
    pool: Annotated[list[str] | None, typer.Option(help="A pool of drafters; may be given again.")] = None,
    journal: Annotated[
        bool, typer.Option("--journal", help="The journal too, with the limits of WISP_JOURNAL_BYTES and _HOURS.")
    ] = False,
    devices: Annotated[Path | None, typer.Option(help="The schedulers' WISP_DEVICES_FILE: devices that join.")] = None,
) -> None:
    """Print users, permissions, queues and policies, one user per service, for `rabbitmqctl import_definitions`.

    The output holds hashes of the passwords only; the same passwords give the same output.
    """
    with errors_shown():
        from shared.broker.devices import read_devices
        from shared.runtime.settings import ServiceSettings

        topology = Topology(namespace_of(namespace))
        pools = [checked("pool", name) for name in pool or [DEFAULT_POOL]]
        outside = read_devices(devices) if devices else []
        users = {device: user_of(topology, device_name(device)) for device in outside}
        known = filled(passwords, [*(user_of(topology, service) for service in ROLES), *users.values()])
        limits = ServiceSettings.model_validate({"journal": journal}).journal_limits
        made = definitions(topology, known, vhost=vhost, pools=pools, journal=limits)
        joining = (device_definitions(topology, device, known[users[device]], vhost=vhost) for device in outside)
        print_json(joined(made, *joining))


def namespace_of(given: str | None) -> str:
    """The namespace of an option, of the environment, or the services' default. Raises SettingsError."""
    from services.tools.local.settings import LocalSettings
    from shared.runtime.settings import ServiceSettings

    default: str = ServiceSettings.model_fields["namespace"].default
    return checked("namespace", given or LocalSettings().namespace or default)


def checked(what: str, name: str) -> str:
    """The name, if it may be part of a queue's name. Raises SettingsError."""
    from shared.runtime.settings import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, name):
        raise SettingsError(f"{what} {name!r}: letters, digits, _ and - only, 64 at most")
    return name


def filled(path: Path, users: list[str]) -> dict[str, str]:
    """The users' passwords in the file, which gets those that it lacks. Raises SettingsError."""
    try:
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"passwords {path}: {error}") from error
    if not isinstance(known, dict) or not all(isinstance(value, str) and value for value in known.values()):
        raise SettingsError(f'passwords {path}: expected a JSON object of user names and passwords: {{"user": "..."}}')
    lacking = [user for user in users if user not in known]
    if lacking:
        known |= {user: token_urlsafe(32) for user in lacking}
        try:
            draft = path.with_name(f".{path.name}.new")
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(json.dumps(known, indent=2) + "\n")
            draft.replace(path)
        except OSError as error:
            raise SettingsError(f"passwords {path}: {error}") from error
        err.print(f"drew {len(lacking)} passwords; they are in {path}, for this user alone to read", style="dim")
    return known


def print_json(value: Any) -> None:
    """To the output, for a file or another program."""
    print(json.dumps(value, indent=2))
