"""Podman with private storage and settings, and the images under test, for `images_test.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pip._internal.models.index import PyPI

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".wisp/images"
PACKAGES = ["podman", "buildah", "runc", "debootstrap", "netavark", "aardvark-dns", "iptables", "iproute2", "catatonit"]
BASE = "localhost/wisp-base:bookworm"
BROKERS = "localhost/wisp-test-brokers:0.1.0"
CONTAINERS_CONF = """\
[containers]
log_driver = "k8s-file"
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_backend = "netavark"
"""
STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{state}/graph"
runroot = "{state}/run"
"""


def install() -> None:
    """Install podman and its dependencies where they are missing."""
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.exit("make images-test needs root, and apt-get", 2)
    if all(shutil.which(name) for name in ("podman", "buildah", "runc", "debootstrap", "catatonit", "iptables")):
        return
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "install", "-y", "--no-install-recommends", *PACKAGES], check=True)


def environment() -> dict[str, str]:
    """Return the environment for podman and for commands that call it."""
    STATE.mkdir(parents=True, exist_ok=True)
    (STATE / "containers.conf").write_text(CONTAINERS_CONF)
    (STATE / "storage.conf").write_text(STORAGE_CONF.format(state=STATE))
    return {
        **os.environ,
        "PATH": f"{ROOT / '.wisp/tools/bin'}:{os.environ['PATH']}",
        "CONTAINERS_CONF": str(STATE / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(STATE / "storage.conf"),
        "ENGINE": "podman",
        "COMPOSE": "podman-compose",
    }


class Podman:
    """Podman with the settings of the tests."""

    def __init__(self) -> None:
        self.env = environment()

    def __call__(self, *arguments: str, input: str | None = None, check: bool = True) -> str:
        """Run podman and return its standard output. Raises RuntimeError with its output if it fails."""
        return self.run(["podman", *arguments], input=input, check=check)

    def run(
        self, command: list[str], *, env: Mapping[str, str] | None = None, input: str | None = None, check: bool = True
    ) -> str:
        """Run any command in podman's environment."""
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**self.env, **(env or {})}, input=input, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
        return done.stdout.strip()

    def has_image(self, name: str) -> bool:
        """Return whether an image exists."""
        return subprocess.run(["podman", "image", "exists", name], env=self.env, check=False).returncode == 0

    def logs(self, container: str) -> str:
        """Return the last lines of a container's log."""
        command = ["podman", "logs", "--tail", "30", container]
        done = subprocess.run(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.stdout

    def healthy(self, container: str) -> bool:
        """Run a container's health check now, because without systemd no timer does."""
        command = ["podman", "healthcheck", "run", container]
        return subprocess.run(command, env=self.env, capture_output=True, check=False).returncode == 0

    def until_healthy(self, *containers: str, within_s: float = 180) -> None:
        """Wait until their health checks succeed."""
        end = time.monotonic() + within_s
        for container in containers:
            while not self.healthy(container):
                if time.monotonic() > end:
                    raise AssertionError(f"{container} is not healthy after {within_s:.0f} s:\n{self.logs(container)}")
                time.sleep(0.5)

    def inspect(self, template: str, *what: str) -> str:
        """Return a field of a container or image."""
        return self("inspect", "--format", template, *what)


def pip_options() -> list[str]:
    """Return build options that give pip in a build this machine's pip settings and the folders that they name."""
    lines = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    settings: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip().strip("'")
    settings.pop("constraint", None)
    (STATE / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    options = [f"--volume={STATE / 'pip.conf'}:/etc/pip.conf:ro"]
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # A repository's files are in a folder beside its index.
            shown = path.parent if path.name == "simple" else path
            options.append(f"--volume={shown}:{shown}:ro")
    return options


def build(podman: Podman) -> dict[str, str]:
    """Build all images and return their names. Unchanged layers come from podman's cache."""
    base = os.environ.get("BASE") or BASE
    if base == BASE and not podman.has_image(BASE):
        podman.run(["docker/base.sh", BASE])
    options = ["--network=host", *pip_options()]
    settings = {"BASE": base, "BUILD_OPTIONS": " ".join(options)}
    if "TORCH_CPU_INDEX" not in os.environ:
        # A machine without access to torch's index may have the wheel in pip's index.
        settings["TORCH_CPU_INDEX"] = PyPI.simple_url
    podman.run(["docker/build.sh", "services", "cpu"], env=settings)
    podman.run(
        [
            *("podman", "build", "--layers", "--network=host", f"--build-arg=BASE={base}", "--tag", BROKERS),
            *("--file", "docker/brokers.Dockerfile", "docker"),
        ]
    )
    return {name: f"localhost/wisp-{name}:{version()}" for name in ("services", "cpu")} | {"brokers": BROKERS}


def version() -> str:
    """Return the project's version."""
    import tomllib

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])
