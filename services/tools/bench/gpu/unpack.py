"""Sets up a bundle of `make gpu-bundle` on a machine with a GPU: `python3 unpack.py`. Needs no network and no pip.

It runs with the Python that has torch, Triton, transformers, numba and numpy, and with the standard library alone. The
pieces beside this file are checked and put together. Of the bundled packages, those are unpacked that this Python
lacks, or has in too old a version.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

CONTENTS = "bundle.json"
NEEDED = ("torch", "triton", "transformers", "numba", "numpy")
"""Packages that are not in the bundle."""
SITE = ".site"
WHEELS = ".wheels"
COMMAND = "wisp"
START = "from services.tools.cli.main import app; app(prog_name='wisp')"
CHUNK = 1 << 20


def main() -> None:
    """Unpack the bundle beside this file."""
    parser = argparse.ArgumentParser(description="Set up a bundle of `make gpu-bundle`; needs no network.")
    parser.add_argument("--to", type=Path, default=Path("wisp-gpu"), help="folder to make (default: wisp-gpu)")
    parser.add_argument("--from", dest="bundle", type=Path, default=Path(__file__).resolve().parent)
    given = parser.parse_args()
    try:
        print(unpack(given.bundle, given.to.absolute()), flush=True)
    except BundleProblem as problem:
        sys.exit(str(problem))


class BundleProblem(Exception):
    """The bundle cannot be set up; the message says why."""


def unpack(bundle: Path, to: Path) -> str:
    """Set a bundle up in the folder `to`; return a line about it. Raises BundleProblem."""
    try:
        contents = json.loads((bundle / CONTENTS).read_text())
    except (OSError, ValueError):
        raise BundleProblem(f"{bundle / CONTENTS} is missing or damaged: copy the whole bundle again") from None
    here = "{}.{}".format(*sys.version_info[:2])
    if here not in contents["pythons"]:
        raise BundleProblem(
            f"the bundle has packages for Python {', '.join(contents['pythons'])}, and this is {here}. Make one for "
            f"it: make gpu-bundle ARGS='--python {here}'"
        )
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleProblem(f"{to} cannot be made: {error.strerror}. Choose another folder: --to") from None
    for archive in contents["archives"]:
        with joined(bundle, archive["pieces"]) as file, tarfile.open(fileobj=file) as tar:
            tar.extractall(to, filter="data")
    taken = install(to / WHEELS / "any", to / SITE) + install(to / WHEELS / here, to / SITE)
    command = to / COMMAND
    command.write_text(
        "#!/bin/sh\n"
        f"cd {shlex.quote(str(to))} || exit 1\n"
        f"export PYTHONPATH={shlex.quote(f'{to}:{to / SITE}')}\n"
        f'exec {shlex.quote(sys.executable)} -c {shlex.quote(START)} "$@"\n'
    )
    command.chmod(0o755)
    lacking = [name for name in NEEDED if version_of(name) is None]
    warning = f" This Python lacks {', '.join(lacking)}: install them before you measure." if lacking else ""
    return (
        f"WISP {contents['commit']} is in {to}, with {len(taken)} packages that this Python lacked.{warning} "
        f"Measure with: {command} bench gpu"
    )


@contextmanager
def joined(bundle: Path, pieces: list[dict[str, Any]]) -> Iterator[IO[bytes]]:
    """Yield the archive of these pieces. Raises BundleProblem if one is missing or damaged."""
    missing = [piece["name"] for piece in pieces if not (bundle / piece["name"]).is_file()]
    if missing:
        raise BundleProblem(f"the bundle lacks {', '.join(missing)}: copy all its pieces into {bundle}")
    with TemporaryFile() as file:
        for piece in pieces:
            digest = hashlib.sha256()
            with (bundle / piece["name"]).open("rb") as part:
                while chunk := part.read(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != piece["sha256"]:
                raise BundleProblem(f"{piece['name']} is damaged: copy it again")
        file.seek(0)
        yield file


def install(wheels: Path, site: Path) -> list[str]:
    """Unpack the wheels that this Python lacks into the folder `site`; return their names."""
    taken = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if not is_there(name, version):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            taken.append(name)
    return taken


def is_there(name: str, version: str) -> bool:
    """Return whether this Python has a package in this version or a later one."""
    found = version_of(name)
    return found is not None and numbers(found) >= numbers(version)


def version_of(name: str) -> str | None:
    """Return the version of a package of this Python; None if it has none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> list[int]:
    """Return the numbers of a version's release: [2, 13, 0] of 2.13.0rc1."""
    release = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in release[0].split(".")] if release else []


if __name__ == "__main__":
    os.umask(0o022)
    main()
