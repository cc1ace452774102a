"""`wisp broker`: definitions for a RabbitMQ that you run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any

import typer

from services.tools.cli.program import Program
from services.tools.cli.terminal import err, errors_shown
from shared.broker.access import definitions, device_definitions, joined, user_of
from shared.broker.topology import DEFAULT_POOL, ROLES, Topology, device_name
from shared.errors import SettingsError
from shared.runtime.files import replacing

app = Program(help="Set up a RabbitMQ of your own.", no_args_is_help=True)


@app.command("definitions")
def print_definitions(
    passwords: Annotated[
        Path, typer.Option(help="JSON file of the users' passwords; missing ones are drawn and added.")
    ],
    namespace: Annotated[
        str | None, typer.Option(help="The suite's prefix. \\[env: WISP_NAMESPACE; default: wisp]")
    ] = None,
    vhost: Annotated[str, typer.Option(help="Virtual host.")] = "/",
    pool: Annotated[list[str] | None, typer.Option(help="A pool of drafters; may be repeated.")] = None,
    journal: Annotated[
        bool,
        typer.Option(
            "--journal", help="Include the journal, with the limits WISP_JOURNAL_BYTES and WISP_JOURNAL_HOURS."
        ),
    ] = False,
    replicated: Annotated[
        bool,
        typer.Option(
            "--replicated", help="Make all shared queues quorum queues, which outlive the loss of a RabbitMQ node."
        ),
    ] = False,
    devices: Annotated[
        Path | None, typer.Option(help="Remote devices that join: the schedulers' WISP_DEVICES_FILE.")
    ] = None,
) -> None:
    """Print users, permissions, queues and policies for `rabbitmqctl import_definitions`, with one user per service.

    The output holds password hashes only. The same passwords give the same output.
    """
    with errors_shown():
        from shared.runtime.settings import ServiceSettings, read_devices

        topology = Topology(namespace_of(namespace), replicated=replicated)
        pools = [checked("pool", name) for name in pool or [DEFAULT_POOL]]
        outside = read_devices(devices) if devices else []
        users = {device: user_of(topology, device_name(device)) for device in outside}
        known = filled(passwords, [*(user_of(topology, service) for service in ROLES), *users.values()])
        limits = ServiceSettings.model_validate({"journal": journal}).journal_limits
        made = definitions(topology, known, vhost=vhost, pools=pools, journal=limits)
        joining = (device_definitions(topology, device, known[users[device]], vhost=vhost) for device in outside)
        print_json(joined(made, *joining))


def namespace_of(given: str | None) -> str:
    """Return the namespace of the option, the environment, or the services' default. Raises SettingsError."""
    from services.tools.local.settings import LocalSettings
    from shared.runtime.settings import ServiceSettings

    default: str = ServiceSettings.model_fields["namespace"].default
    return checked("namespace", given or LocalSettings().namespace or default)


def checked(what: str, name: str) -> str:
    """Return the name if it may be part of a queue's name. Raises SettingsError."""
    from shared.runtime.settings import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, name):
        raise SettingsError(f"{what} {name!r}: use up to 64 letters, digits, _ and -")
    return name


def filled(path: Path, users: list[str]) -> dict[str, str]:
    """Return the users' passwords from the file; draw missing ones and add them to it. Raises SettingsError."""
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
            with replacing(path, 0o600) as draft:
                draft.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise SettingsError(f"passwords {path}: {error}") from error
        err.print(f"drew {len(lacking)} passwords; they are in {path}, readable by this user only", style="dim")
    return known


def print_json(value: Any) -> None:
    """Print JSON to standard output."""
    print(json.dumps(value, indent=2))
